"""DTensor parameters: a rank steps its shards, with norms of the whole that one small all-reduce gives.

What a rank sends follows from what all ranks of a mesh know alike (the parameters, their meshes and
placements) and never from what it happens to hold. So no empty shard and no missing gradient makes another
rank wait for ever. peers.py sees to it that the ranks do know it alike.

An import of this package imports torch.distributed.tensor, which takes a second.
"""
