"""Stochastic rounding and 8-bit momentum: which bits a step draws, and what becomes of a number."""

import math

import numpy as np
import pytest
import torch

import bounds
import rounding
from cases import BF16, F16, F32, F64, INT8
from layouts import LAYOUTS, Layout, Layouts
from reference import Rule
from rounding import MOMENTUM_BUFFER, WEIGHT
from stepping import Dtypes, Leaf, call_op, make_leaf, same_bits, snapshot, to_numpy

OPS = ["step_", "reference_step_"]
HALVES = {"bf16": BF16, "fp16": F16}
CODES = torch.ops.fused_lars

# With these options and no weight or momentum, the buffer becomes the gradient, and the weight its negative.
# So the numbers before rounding are known exactly.
EXACT = dict(lr=1.0, momentum=0.5, layer_adaptation=False)

every_op = pytest.mark.parametrize("op", OPS)
every_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)


def rng_state_of(leaf: Leaf) -> tuple[int, int, int]:
    return tuple(leaf.rng_state.tolist())


def make_rng_state(device, key=(5 << 32) + 3, update=0, first_element=0):
    return torch.tensor([key, update, first_element], device=device)


def weight_leaf(values: torch.Tensor, dtype, device, **of_rng) -> Leaf:
    """A leaf whose weight becomes `values`, rounded to `dtype`."""
    rule = Rule(lr=1.0, layer_adaptation=False, stochastic_rounding=True)
    grad = -values.to(device)
    rng_state = make_rng_state(device, **of_rng)
    return Leaf("w", rule, torch.zeros_like(grad, dtype=dtype), grad, rng_state=rng_state)


def momentum_leaf(values: torch.Tensor, dtype, device, **of_rng) -> Leaf:
    """A leaf with an fp32 weight whose buffer becomes `values`, rounded to `dtype`."""
    grad = values.to(device)
    buffer = torch.zeros_like(grad, dtype=dtype)
    leaf = Leaf("w", Rule(**EXACT), torch.zeros_like(grad), grad, buffer)
    leaf.rng_state = make_rng_state(device, **of_rng)
    if dtype == INT8:
        leaf.momentum_scale = torch.zeros(-(-grad.numel() // bounds.BLOCK), device=device)
    return leaf


def assert_same_numbers(got: torch.Tensor, expected: torch.Tensor):
    """Compares bits, of which those of a NaN do not matter."""
    got = got.detach().cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert same_bits(got[number], expected[number])


def numbers(generator) -> torch.Tensor:
    """fp32 numbers of every exponent and both signs, and those at the edges of 16-bit types."""
    every = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32).view(F32)
    usual = torch.randn(5_000, generator=generator)
    fp16 = usual * 2.0 ** torch.randint(-26, 17, (5_000,), generator=generator)  # subnormal to too large
    edges = [0.0, 65504.0, 65519.99, 65535.99, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-37, 1e-45]
    edges += [1.0, 1.0 + 2.0**-8, 1.0 + 2.0**-23, 3.3895314e38, 3.4028235e38, math.inf, math.nan]
    edges = torch.tensor(edges)
    # 0 - 0 is 0, so a zero has no sign.
    return torch.cat([every, usual, fp16, edges, -edges]) + 0.0


# ---------------------------------------------------------------- the bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],  # digits of pi
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_philox(counter, key, expected):
    """Those of 7 rounds in the kat_vectors of Random123."""
    assert " ".join(f"{int(word):08x}" for word in rounding.philox4x32(counter, key)) == expected


@every_op
@every_half
@pytest.mark.parametrize(
    "rng",
    [
        {},
        dict(key=2**63 - 1, update=2**32 - 1, first_element=1),
        dict(key=(7 << 32) + 1, update=2**32 + 5, first_element=2**35 - 3),
    ],
    ids=["zeros", "largest", "carry"],
)
def test_bits_of_a_weight(op, dtype, rng, device, generator):
    values = numbers(generator)
    leaf = weight_leaf(values, dtype, device, **rng)
    for _ in range(2):
        random = rounding.random_bits(rng_state_of(leaf), WEIGHT, values.numel())
        key, update, first_element = rng_state_of(leaf)
        leaf.param.zero_()
        call_op([leaf], op=op)
        assert_same_numbers(leaf.param, rounding.to_16_bits(values.numpy(), random, dtype))
        assert rng_state_of(leaf) == (key, update + 1, first_element)


@every_op
@pytest.mark.parametrize(
    "dtypes",
    [
        Dtypes(F32, F32, BF16),
        Dtypes(F32, F32, F16),
        Dtypes(BF16, F32, BF16, stochastic=True),
        Dtypes(F16, F32, F16, stochastic=True),
        Dtypes(BF16, F32, BF16, master=True),
        Dtypes(F16, F32, F16, master=True),
    ],
    ids=str,
)
def test_bits_of_a_momentum_buffer(op, dtypes, device, generator):
    values = numbers(generator)
    leaf = momentum_leaf(values, dtypes.state, device, update=9, first_element=11)
    leaf.rule = Rule(**EXACT, **dtypes.switches)
    leaf.param = leaf.param.to(dtypes.param)
    leaf.master_param = torch.zeros_like(leaf.grad) if dtypes.master else None
    random = rounding.random_bits(rng_state_of(leaf), MOMENTUM_BUFFER, values.numel())
    call_op([leaf], op=op)
    expected = rounding.to_16_bits(values.numpy(), random, dtypes.state)
    assert_same_numbers(leaf.momentum_buffer, expected)
    if dtypes.master:  # which loses nothing, and is rounded to nearest
        assert_same_numbers(leaf.param, leaf.master_param.cpu().to(dtypes.param))


@every_op
@every_half
def test_a_negative_zero_stays(op, dtype, device):
    rule = Rule(**EXACT, stochastic_rounding=True)
    zero = torch.full((9,), -0.0, device=device)
    leaf = Leaf("w", rule, torch.full_like(zero, -1.0, dtype=dtype), zero, zero.to(dtype))
    leaf.rng_state = make_rng_state(device)
    call_op([leaf], op=op)
    assert same_bits(leaf.momentum_buffer, zero.to(dtype))
    leaf.param.copy_(zero)
    leaf.momentum_buffer.zero_()
    call_op([leaf], op=op)
    assert same_bits(leaf.param, zero.to(dtype))


def blocks(generator) -> torch.Tensor:
    """Blocks of every magnitude, some with few numbers or special ones. The last one is short."""
    x = torch.randn(120, bounds.BLOCK, generator=generator)
    x *= 2.0 ** torch.arange(-149.0, 121.0, 2.25).unsqueeze(1)
    x[::7] *= torch.rand(x[::7].shape, generator=generator) < 0.1
    special = torch.randn(12, bounds.BLOCK, generator=generator)
    special[0] = 0.0
    special[1] = -0.0
    special[2, 5] = math.nan
    special[3, 127] = -math.inf
    special[4] = torch.finfo(F32).max
    special[5] = special[5].clamp(-1, 1) * 2.0**-112
    special[5, 0] = 2.0**-112
    special[6] = torch.linspace(-127, 127, bounds.BLOCK)
    special[7] = 1.0
    special[8] = 126.99999
    special[9, 1:] = 0.0
    special[10] = 127 * 2.0**-126
    special[11] = -126.5 * 2.0**-126
    return torch.cat([x, special]).flatten()[:-91]


@every_op
@pytest.mark.parametrize("first_element", [0, 3, 2**33 + 128])
def test_bits_of_int8_momentum(op, first_element, device, generator):
    values = blocks(generator)
    leaf = momentum_leaf(values, INT8, device, update=4, first_element=first_element)
    random = rounding.random_bits(rng_state_of(leaf), MOMENTUM_BUFFER, values.numel())
    codes, scales = rounding.to_int8(values.numpy(), random)
    call_op([leaf], op=op)
    assert_same_numbers(leaf.momentum_scale, torch.from_numpy(scales))
    assert np.array_equal(leaf.momentum_buffer.cpu().numpy(), codes)
    # The next step reads what this one wrote: it halves it. Halves of the scales are exact.
    leaf.grad.zero_()
    random = rounding.random_bits(rng_state_of(leaf), MOMENTUM_BUFFER, values.numel())
    half = rounding.decode(torch.from_numpy(codes), torch.from_numpy(scales)).float() * 0.5
    codes, scales = rounding.to_int8(half.numpy(), random)
    call_op([leaf], op=op)
    assert_same_numbers(leaf.momentum_scale, torch.from_numpy(scales))
    assert np.array_equal(leaf.momentum_buffer.cpu().numpy(), codes)


@every_op
def test_codes_where_no_scale_is_small_enough(op, device):
    """Blocks below 2^-112. A code of 128 would be -128."""
    largest = torch.tensor(2.0**-112).nextafter(torch.tensor(0.0)).item()
    values = torch.tensor([largest, 2.0**-113, 2.0**-140]).repeat_interleave(bounds.BLOCK)
    leaf = momentum_leaf(values, INT8, device)
    call_op([leaf], op=op)
    assert bool((leaf.momentum_buffer >= 0).all())
    codes, scale = CODES.encode_momentum(values.to(device))
    assert bool((codes >= 0).all())
    off = (CODES.decode_momentum(codes, scale).cpu() - values).abs().numpy()
    assert (off <= bounds.code_gap(values.numpy(), 0.0)).all()


@every_op
@every_half
def test_weight_and_momentum_buffer_draw_bits_of_their_own(op, dtype, device, generator):
    """Both become the same numbers half-way between two that the dtype has."""
    values = torch.full((4096,), 1.0 + bounds.ROUNDOFF[dtype])
    leaf = weight_leaf(values, dtype, device)
    leaf.rule = Rule(**EXACT, stochastic_rounding=True)
    leaf.momentum_buffer = torch.zeros_like(leaf.param)
    call_op([leaf], op=op)
    same = (leaf.param == -leaf.momentum_buffer).double().mean().item()
    assert abs(same - 0.5) < 5 * 0.5 / 64  # of 4,096 elements


# ---------------------------------------------------------------- what becomes of a number


@every_half
@pytest.mark.parametrize("fraction", [0.03, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("magnitude", [1.0, -192.0, 3e-6])
def test_the_mean_is_exact(dtype, fraction, magnitude, device):
    """Over many updates, and over many elements. 3e-6 is a subnormal number of fp16."""
    numel, updates = 2048, 256
    half = torch.tensor(magnitude).to(dtype)
    neighbour = half.nextafter(half * 2)
    unit = neighbour.double() - half.double()
    value = (half.double() + fraction * unit).float()
    leaf = weight_leaf(value.expand(numel), dtype, device)
    up = torch.zeros(updates, numel, dtype=F64)
    for i in range(updates):
        leaf.param.zero_()
        call_op([leaf])
        up[i] = ((leaf.param.double().cpu() - half.double()) / unit).abs()
    assert set(up.unique().tolist()) == {0.0, 1.0}
    share = ((value.double() - half.double()) / unit).item()
    deviation = math.sqrt(share * (1 - share))
    # Five standard deviations of a mean; of the largest of many, six. fp16 uses 13 bits.
    assert abs(up.mean() - share) < 5 * deviation / math.sqrt(up.numel()) + 2.0**-13
    for dim in (0, 1):
        off = (up.mean(dim) - share).abs().max()
        assert off < 6 * deviation / math.sqrt(up.shape[dim]) + 2.0**-13 + 1 / up.shape[dim]


def test_the_mean_of_int8_momentum_is_exact(device):
    """Up to half a step of the random number, 2^-13 of the codes' distance, and the arithmetic's error."""
    updates = 256
    values = torch.linspace(-1, 1, 16 * bounds.BLOCK)
    leaf = momentum_leaf(values, INT8, device)
    total = torch.zeros(values.numel(), dtype=F64)
    for _ in range(updates):
        leaf.momentum_buffer.zero_()
        call_op([leaf])
        total += rounding.decode(leaf.momentum_buffer, leaf.momentum_scale)
    scale = leaf.momentum_scale.double().cpu().repeat_interleave(bounds.BLOCK)
    gap = torch.from_numpy(bounds.code_gap(values.abs().double().numpy(), scale.numpy()))
    off = (total / updates - values.double()) / gap
    bias = 2.0**-13 + 64 * bounds.CODE_ERROR  # two codes are at least a 64th of their number apart
    assert off.abs().max() < 6 * 0.5 / math.sqrt(updates) + bias
    assert abs(off.mean()) < 5 * 0.5 / math.sqrt(updates * values.numel()) + bias


@every_op
@every_half
def test_what_the_dtype_holds_stays(op, dtype, device):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    leaf = weight_leaf(every, dtype, device)
    for _ in range(3):
        leaf.param.zero_()
        call_op([leaf], op=op)
        assert_same_numbers(leaf.param, every.to(dtype) + 0)


@every_op
def test_codes_times_their_scale_stay(op, device, generator):
    momentum = torch.randn(40, bounds.BLOCK, generator=generator) * torch.logspace(-30, 30, 40).unsqueeze(1)
    codes, scale = CODES.encode_momentum(momentum.flatten()[:-50].to(device))
    leaf = momentum_leaf(CODES.decode_momentum(codes, scale), INT8, device)
    for _ in range(3):
        leaf.momentum_buffer.zero_()
        call_op([leaf], op=op)
        assert same_bits(leaf.momentum_buffer, codes)
        assert same_bits(leaf.momentum_scale, scale)


@every_op
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_where_it_is(op, value, device, generator):
    """In 16 bits in its element. In 8 bits a block has no code for it, and becomes NaN."""
    values = torch.randn(5 * bounds.BLOCK + 9, generator=generator)
    for place in (0, 2 * bounds.BLOCK + 77, values.numel() - 1):
        special = values.clone()
        special[place] = value
        for dtype in (BF16, F16, INT8):
            leaf, other = (momentum_leaf(x, dtype, device, first_element=5) for x in (special, values))
            call_op([leaf], op=op)
            call_op([other], op=op)
            got, expected = leaf.momentum_buffer.cpu(), other.momentum_buffer.cpu()
            hit = torch.zeros(values.shape, dtype=torch.bool)
            if dtype == INT8:
                hit[place // bounds.BLOCK * bounds.BLOCK :][: bounds.BLOCK] = True
                got = CODES.decode_momentum(leaf.momentum_buffer, leaf.momentum_scale).cpu()
                expected = CODES.decode_momentum(other.momentum_buffer, other.momentum_scale).cpu()
                assert bool(got[hit].isnan().all())
            else:
                hit[place] = True
                assert_same_numbers(got[hit], torch.full((1,), value).to(dtype))
            assert same_bits(got[~hit], expected[~hit])


@every_op
@pytest.mark.parametrize("numel", [1, 7, 127, 128, 129, 257, 511, 512, 513, 4096, 4223])
def test_zeros_and_blocks_that_are_short(op, numel, device, generator):
    """A block has the scale of its own elements only, and zeros stay zeros."""
    values = torch.randn(numel, generator=generator)
    leaf = momentum_leaf(values, INT8, device)
    call_op([leaf], op=op)
    codes, scales = rounding.to_int8(values.numpy(), rounding.random_bits(((5 << 32) + 3, 0, 0), 0, numel))
    assert np.array_equal(leaf.momentum_buffer.cpu().numpy(), codes)
    assert np.array_equal(leaf.momentum_scale.cpu().numpy(), scales)
    zero = momentum_leaf(torch.zeros(numel), INT8, device)
    call_op([zero], op=op)
    assert not zero.momentum_buffer.any()
    assert bool((zero.momentum_scale > 0).all())


# ---------------------------------------------------------------- rng_state


@pytest.mark.parametrize("implementation", OPS)
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_skipped_step_counts_no_update(implementation, found_inf, device, generator):
    leaves = [
        make_leaf("int8", LAYOUTS["matrix"], Dtypes(F32, F32, INT8), Rule(**EXACT), device, generator),
        make_leaf(
            "bf16",
            LAYOUTS["size 0"],
            Dtypes(BF16, stochastic=True),
            Rule(**EXACT, stochastic_rounding=True),
            device,
            generator,
        ),
    ]
    before = snapshot(leaves)
    call_op(leaves, found_inf=torch.tensor(found_inf, device=device), op=implementation)
    for leaf, old in zip(leaves, before):
        key, update, first_element = old["rng_state"].tolist()
        applied = 0 if found_inf else 1
        assert rng_state_of(leaf) == (key, update + applied, first_element)
        if found_inf:
            assert all(same_bits(x, old[name]) for name, x in leaf.tensors().items())


@every_op
@pytest.mark.parametrize("begin", [1, 8, 13, 128, 4096, 4101])
@pytest.mark.parametrize("first_element", [0, 2**32 - 4100])
def test_a_part_of_a_tensor_gets_the_bits_of_the_whole(op, begin, first_element, device, generator):
    """As the shards of a parameter do. Blocks of int8 are those of the part, so it begins with a block."""
    values = torch.randn(9000, generator=generator)
    part = slice(begin, begin + 4500)
    makers = [(weight_leaf, BF16), (weight_leaf, F16), (momentum_leaf, BF16), (momentum_leaf, F16)]
    if begin % bounds.BLOCK == 0:
        makers.append((momentum_leaf, INT8))
    for make, dtype in makers:
        whole = make(values, dtype, device, first_element=first_element)
        shard = make(values[part], dtype, device, first_element=first_element + begin)
        unshifted = make(values[part], dtype, device, first_element=first_element)
        call_op([whole, shard, unshifted], op=op)
        name = "param" if make is weight_leaf else "momentum_buffer"
        all_of, got, wrong = (getattr(leaf, name) for leaf in (whole, shard, unshifted))
        if dtype == INT8:  # the last block of the part is short
            full = 4500 // bounds.BLOCK * bounds.BLOCK
            assert same_bits(got[:full], all_of[part][:full])
        else:
            assert same_bits(got, all_of[part])
        assert not same_bits(got, wrong)


@every_op
@every_half
def test_every_key_and_update_has_bits_of_its_own(op, dtype, device):
    """The high and the low word of the key, and the number of updates."""
    values = torch.full((512,), 1.0 + bounds.ROUNDOFF[dtype])
    results = []
    for key, update in ((0, 0), (1, 0), (1 << 32, 0), (0, 1)):
        leaf = weight_leaf(values, dtype, device, key=key, update=update)
        call_op([leaf], op=op)
        results.append(leaf.param.cpu())
    for i, a in enumerate(results):
        for b in results[:i]:
            same = (a == b).double().mean().item()
            assert abs(same - 0.5) < 5 * 0.5 / math.sqrt(512)


@every_op
def test_the_order_in_memory_numbers_the_elements(op, device, generator):
    """A transposed weight gets the bits of the contiguous one, one with gaps those of a dense one."""
    values = torch.randn(13, 6, generator=generator)
    contiguous = weight_leaf(values, BF16, device, first_element=3)
    transposed, gaps = (weight_leaf(x, BF16, device, first_element=3) for x in (values.t(), values))
    gaps.param = torch.zeros(13, 20, dtype=BF16, device=device)[:, 2:14:2]
    assert transposed.param.stride() == (1, 6)
    for leaf in (contiguous, transposed, gaps):
        call_op([leaf], op=op)
    assert same_bits(transposed.param.t(), contiguous.param)
    assert same_bits(gaps.param, contiguous.param)


# ---------------------------------------------------------------- encode_momentum, decode_momentum

MOMENTA = {
    "vector": lambda x: x,
    "short": lambda x: x[:5],
    "empty": lambda x: x[:0],
    "0-dim": lambda x: x[0],
    "channels_last": lambda x: x[:2400].reshape(2, 8, 10, 15).contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x[:2400].reshape(48, 50).t(),
    "columns": lambda x: x[:2400].reshape(48, 50)[:, ::2],
    "transposed columns": lambda x: x[:2400].reshape(48, 50)[:, ::2].t(),
    "bf16": lambda x: x.bfloat16(),
    "fp64": lambda x: x.double(),
}


@pytest.mark.parametrize("of", MOMENTA.values(), ids=MOMENTA)
def test_momentum_is_encoded_to_nearest(of, device, generator):
    """The error is half the codes' distance, beside the step of the random numbers and the arithmetic's."""
    x = torch.randn(2500, generator=generator) * 2.0 ** torch.arange(-20, 5).repeat_interleave(100)
    momentum = of(x.to(device))
    codes, scale = CODES.encode_momentum(momentum)
    assert codes.dtype == INT8
    assert codes.shape == momentum.shape
    assert rounding.is_dense(codes)
    decoded = CODES.decode_momentum(codes, scale)
    assert decoded.dtype == F32
    assert torch.equal(decoded.double().cpu(), rounding.decode(codes, scale))
    values = rounding.in_memory_order(momentum.float(), codes)
    its_scale = scale.double().cpu().repeat_interleave(bounds.BLOCK)[: values.numel()]
    off = (rounding.in_memory_order(decoded, codes).double() - values.double()).abs()
    gap = torch.from_numpy(bounds.code_gap(values.double().abs().numpy(), its_scale.numpy()))
    allowed = (0.5 + 2.0**-12) * gap + bounds.CODE_ERROR * values.double().abs()
    assert bool((off <= allowed).all())
    expected_codes, expected_scale = rounding.to_int8(values.numpy())
    assert np.array_equal(rounding.in_memory_order(codes, codes).numpy(), expected_codes)
    assert np.array_equal(scale.cpu().numpy(), expected_scale)
    # What was decoded has the same codes again, so a state_dict that is loaded changes nothing.
    again, same_scale = CODES.encode_momentum(decoded)
    assert same_bits(again, codes)
    assert same_bits(same_scale, scale)


def test_blocks_of_every_magnitude_keep_their_codes(device, generator):
    codes, scale = CODES.encode_momentum(blocks(generator).to(device))
    expected_codes, expected_scale = rounding.to_int8(blocks(torch.Generator().manual_seed(0)).numpy())
    assert np.array_equal(codes.cpu().numpy(), expected_codes)
    assert_same_numbers(scale, torch.from_numpy(expected_scale))
    decoded = CODES.decode_momentum(codes, scale)
    again, same_scale = CODES.encode_momentum(decoded)
    assert same_bits(again, codes)
    assert_same_numbers(same_scale, scale.cpu())
    finite = torch.from_numpy(expected_scale).isfinite().repeat_interleave(bounds.BLOCK)[: codes.numel()]
    assert torch.equal(decoded.cpu().isfinite(), finite)


def test_momentum_that_cannot_be_encoded(device):
    codes, scale = torch.zeros(2, 100, dtype=INT8, device=device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match=r"^momentum has dtype Int; allowed: a floating-point dtype"):
        CODES.encode_momentum(codes.int())
    for wrong in (codes.int(), codes[:, ::2], codes[:, :1].expand(2, 100)):
        with pytest.raises(
            ValueError, match=r"^codes is (Int|Char) with strides .*; expected a dense tensor"
        ):
            CODES.decode_momentum(wrong, scale)
    for wrong in (scale.double(), scale[:1], scale.reshape(2, 1), torch.ones(3, device=device)):
        with pytest.raises(
            ValueError, match=r"^scale is (Float|Double)\[.*expected a vector of Float with 2 elements"
        ):
            CODES.decode_momentum(codes, wrong)


# ---------------------------------------------------------------- what rounding to nearest loses


def test_a_slowly_decaying_buffer_decays(device):
    """Rounded to nearest, 0.999 times a bf16 number is the number itself."""
    steps, numel = 400, 4096
    nearest = torch.ones(numel, dtype=BF16)
    leaf = momentum_leaf(torch.zeros(numel), BF16, device)
    leaf.rule = Rule(momentum=0.999, layer_adaptation=False)
    leaf.momentum_buffer.fill_(1.0)
    for _ in range(steps):
        nearest = (0.999 * nearest.float()).to(BF16)
        call_op([leaf])
    assert bool((nearest == 1).all())
    # A number below 1 is rounded by less than 2^-8, with a deviation of at most half of that in each step.
    deviation = 2.0**-9 * math.sqrt(steps / numel)
    assert abs(leaf.momentum_buffer.double().mean().item() - 0.999**steps) < 5 * deviation


@pytest.mark.parametrize("stochastic", [False, True])
def test_small_updates_add_up(stochastic, device):
    """A fifth of a unit in the last place of a bf16 weight, in each of 100 steps."""
    unit, steps, numel = 2.0**-7, 100, 4096
    rule = Rule(lr=1.0, layer_adaptation=False, stochastic_rounding=stochastic)
    param, grad = torch.ones(numel, dtype=BF16, device=device), torch.full((numel,), -unit / 5, device=device)
    leaf = Leaf("w", rule, param, grad, rng_state=make_rng_state(device) if stochastic else None)
    exact = to_numpy(param).copy()
    for _ in range(steps):
        call_op([leaf])
        exact -= to_numpy(grad)
    if not stochastic:
        assert bool((param == 1).all())
        return
    deviation = unit * math.sqrt(0.2 * 0.8 * steps / numel)
    assert abs(param.double().mean().item() - exact.mean()) < 5 * deviation


def test_int8_momentum_of_a_training_run_follows_fp64(device, generator):
    """Where all elements of a block are alike. Each is the largest, which is exact."""
    steps, numel = 60, 32 * bounds.BLOCK
    leaf = make_leaf("w", Layouts(Layout((numel,))), Dtypes(F32, F32, INT8), Rule(**EXACT), device, generator)
    leaf.rule = Rule(momentum=0.9, layer_adaptation=False, lr=0.125)
    leaf.momentum_buffer.zero_()
    weight, momentum, largest = to_numpy(leaf.param).copy(), np.zeros(numel), 0.0
    largest_weight = np.abs(weight).max() + 1
    for step in range(steps):
        leaf.grad.copy_(torch.full((numel,), math.cos(step)))
        call_op([leaf])
        momentum = 0.9 * momentum + 0.125 * to_numpy(leaf.grad)
        weight -= momentum
        largest = max(largest, np.abs(momentum).max())
    got = rounding.decode(leaf.momentum_buffer, leaf.momentum_scale).numpy()
    # Each step adds the error of the code and of four operations in fp32, and keeps 0.9 of those before.
    u = bounds.ROUNDOFF[F32]
    error = (bounds.CODE_ERROR + 8 * u) * largest / (1 - 0.9) * bounds.SLACK
    assert np.abs(got - momentum).max() < error
    assert np.abs(to_numpy(leaf.param) - weight).max() < steps * (error + u * largest_weight)
