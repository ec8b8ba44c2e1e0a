"""Which part of a whole tensor this rank holds, for plain tensors and for FSDP's sharded ones."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A box inside a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no element."""
        return 0 in self.shape

    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def intersection(self, other: "Region") -> "Region":
        """The box common to both, empty when they do not touch."""
        start = tuple(map(max, self.offset, other.offset))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        return Region(start, tuple(max(0, end - first) for first, end in zip(start, ends, strict=True)))

    def relative_to(self, origin: tuple[int, ...]) -> "Region":
        """The same box, seen from a tensor that starts at `origin`."""
        return Region(tuple(a - b for a, b in zip(self.offset, origin, strict=True)), self.shape)


def tiles(boxes: Sequence[Region], whole: Region) -> bool:
    """Whether boxes make up `whole`, each point once; they may be cut along one dimension, as FSDP does."""
    if not boxes:
        return whole.is_empty
    spans = [[(box.offset[dim], box.shape[dim]) for box in boxes] for dim in range(len(whole.shape))]
    cut = [dim for dim, found in enumerate(spans) if set(found) != {(whole.offset[dim], whole.shape[dim])}]
    if len(cut) != 1:
        return not cut and len(boxes) == 1
    first, last = whole.offset[cut[0]], whole.offset[cut[0]] + whole.shape[cut[0]]
    begins, sizes = zip(*sorted(spans[cut[0]]), strict=True)
    ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    return [*begins, last] == [first, *ends]


def local_part(tensor: Tensor) -> Tensor:
    """The memory of `tensor` that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_region(tensor: Tensor) -> Region:
    """Where `local_part` lies in the whole tensor.

    Raises:
        ValueError: a layout other than replication and one sharded dimension.
    """
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        sharded = [(i, p) for i, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
        if len(sharded) > 1 or any(not isinstance(placement, Shard) for _, placement in sharded):
            raise ValueError(f"layout {tensor.placements}: only replication and one sharded dimension are known")
        for mesh_dim, placement in sharded:
            assert isinstance(placement, Shard)
            dim, num_shards = placement.dim, tensor.device_mesh.size(mesh_dim)
            # FSDP cuts as torch.chunk does: equal pieces, the last ones shorter or empty.
            piece = -(-shape[dim] // num_shards)
            offset[dim] = min(tensor.device_mesh.get_local_rank(mesh_dim) * piece, shape[dim])
            shape[dim] = min(piece, shape[dim] - offset[dim])
    return Region(tuple(offset), tuple(shape))


def is_first_replica(tensor: Tensor, rank: int) -> bool:
    """Whether this rank is the one of several equal holders that writes the tensor."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    replicated = [i for i, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    return all(tensor.device_mesh.get_local_rank(mesh_dim) == 0 for mesh_dim in replicated)


def copy_whole(tensor: Tensor, whole: Tensor) -> None:
    """Fills this rank's part of `tensor` from the whole value."""
    with torch.no_grad():
        local_part(tensor).copy_(whole[local_region(tensor).slices()])
