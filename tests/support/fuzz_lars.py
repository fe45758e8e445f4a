"""Loads damaged copies of a stored Lars and uses what loads; a crash ends the process.

    python fuzz_lars.py COUNT

Damages COUNT copies each of a pickle, of what torch.save wrote and of a saved script, and COUNT states.
Prints how often each kind of file loaded and how often it was refused.
"""

import collections
import faulthandler
import io
import pickle
import resource
import sys
import zipfile
from pathlib import Path
from random import Random

import torch

import fused_lars
from scripted_trainer import Trainer, batches


def damaged(data: bytes, random: Random) -> bytes:
    result = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(result))
        kind = random.randrange(5)
        if kind == 0:
            result[at] = random.randrange(256)
        elif kind == 1:
            result[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            del result[at : at + random.randint(1, 8)]
        elif kind == 3:
            source = random.randrange(len(result))
            result[at:at] = result[source : source + random.randint(1, 8)]
        else:
            result[at : at + 4] = random.choice(
                (bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", b"....", b"0000")
            )
        if not result:
            break
    return bytes(result)


def damaged_archive(data: bytes, random: Random) -> bytes:
    """Damages one file of an archive and corrects its checksum."""
    archive, result = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = [name for name in archive.namelist() if archive.read(name)]
    pickles = [name for name in names if name.endswith(".pkl")]
    victim = random.choice(pickles if random.random() < 0.8 else names)
    with zipfile.ZipFile(result, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            copy.writestr(name, damaged(content, random) if name == victim else content)
    return result.getvalue()


def damaged_state(state: list, random: Random) -> tuple:
    wrong = [
        *(None, -1, 2**62, 1.5, "x", [], [1], [None], (), {}, float("nan"), [0.1] * 4, [1, 1], torch.ones(2)),
        *([torch.ones(2)], [torch.ones(2).long()], [torch.ones(3).to_sparse()], [torch.ones(1).expand(5)]),
    ]
    for _ in range(random.randint(1, 3)):
        place = random.randrange(len(state))
        kind = random.randrange(4)
        if kind == 0 and isinstance(state[place], list) and state[place]:
            state[place] = [*state[place][:-1], random.choice(wrong)]
        elif kind == 1 and len(state) > 1:
            del state[place]
        elif kind == 2:
            state.append(random.choice(wrong))
        else:
            state[place] = random.choice(wrong)
    return tuple(state)


def use(lars) -> None:
    repr(lars)
    if not isinstance(lars, fused_lars.Lars):
        return  # a damaged pickle can give another object
    lars.__getstate__()
    weights = [torch.ones(3), torch.ones(2, 2)]
    lars.step_all([4, 7], weights, [torch.ones(3), torch.ones(2, 2)])


def main(count: int) -> None:
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # A damaged length can ask for any amount of memory.
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32,) * 2)
    lars = fused_lars.Lars(0.1).with_momentum(0.9)
    use(lars)
    saved, script = io.BytesIO(), io.BytesIO()
    torch.save(lars, saved)
    trainer = torch.jit.script(Trainer())
    trainer.train_step(*batches(1)[0])
    torch.jit.save(trainer, script)
    saved, script, pickled = saved.getvalue(), script.getvalue(), pickle.dumps(lars)

    def load_script(data: bytes):
        module = torch.jit.load(io.BytesIO(data))
        module.train_step(*batches(1)[0])
        return module.optimizer

    def from_state(state: tuple):
        result = torch.ScriptObject.__new__(torch.ScriptObject)
        result.__setstate__((state, lars._type().qualified_name()))
        return result

    loads = {
        "pickle": lambda random: pickle.loads(damaged(pickled, random)),
        "torch.save": lambda random: torch.load(
            io.BytesIO(damaged_archive(saved, random)), weights_only=False
        ),
        "script": lambda random: load_script(damaged_archive(script, random)),
        "state": lambda random: from_state(damaged_state(list(lars.__getstate__()[0]), random)),
    }
    for name, load in loads.items():
        outcomes = collections.Counter()
        for seed in range(count):
            try:
                use(load(Random(seed)))
                outcomes["loaded"] += 1
            except Exception:
                outcomes["refused"] += 1
        print(name, dict(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]))
