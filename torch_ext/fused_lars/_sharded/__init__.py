"""Steps DTensor parameters. A rank steps its shards; one small all-reduce gives the norms of whole tensors.

What a rank sends depends only on what all ranks of a mesh have in common (the parameters, their meshes and
placements). It never depends on what the rank holds. So an empty shard or a missing gradient cannot make
another rank wait for ever. peers.py checks that the ranks do have this in common.

Importing this package imports torch.distributed.tensor, which takes a second.
"""
