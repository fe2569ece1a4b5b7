"""The file: encoding and writing a state; reading one, of which nothing is believed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import encodings
from .._files import kind_of, replacing
from .error import CheckpointError, about, names
from .mapped import DTYPES, MappedFile
from .state import INFERENCE, State, check_value_dtype
from .structure import FACTORS, Structure, bits_spec, check_shape, prefixed

__all__ = ["FORMAT", "VERSION", "Content", "digest", "read", "write", "write_plain"]

FORMAT, VERSION = "sparseprune", 1
_PRUNED = 0.05  # share of zeros from which a weight counts as pruned, and its values may be rounded
_LARGEST_HEADER = 100_000_000  # bytes; what readers of safetensors take

# A file of this name beside a file of that one is what another library loads as its own: it knows no encoding, and
# fills what it misses with random numbers.
_OTHERS = {
    "model.safetensors": "config.json",
    "diffusion_pytorch_model.safetensors": "config.json",
    "adapter_model.safetensors": "adapter_config.json",
}


@dataclass
class Content:
    """A file that agrees with itself; what its encodings hold is checked as they are decoded.

    ``plain``: name -> tensor stored as it is; ``parts``: name of an encoded tensor -> its parts; ``sizes``: bytes in
    the file, by name.
    """

    structure: Structure = field(default_factory=Structure)
    plain: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    mapped: MappedFile | None = None

    def names(self) -> list[str]:
        """Of all tensors, tied ones too."""
        return [*self.plain, *self.structure.encoded, *self.structure.ties]

    def shape(self, name: str) -> tuple[int, ...]:
        name = self.structure.ties.get(name, name)
        spec = self.structure.encoded.get(name)
        return tuple(self.plain[name].shape) if spec is None else tuple(spec["shape"])

    def dtype(self, name: str) -> torch.dtype:
        name = self.structure.ties.get(name, name)
        spec = self.structure.encoded.get(name)
        if spec is None:
            return self.plain[name].dtype
        return torch.bool if spec["encoding"] == "bits" else encodings.DTYPES[spec["dtype"]]

    def nbytes(self, name: str) -> int:
        """Of the dense tensor; 0 for a tied one."""
        if name in self.structure.ties:
            return 0
        count = 1
        for size in self.shape(name):
            count *= size
        return count * self.dtype(name).itemsize

    def nnz(self, name: str) -> int:
        """Entries of a tensor that are not zero, counted without making it."""
        spec = self.structure.encoded.get(name)
        if spec is None:
            return int(torch.count_nonzero(self.plain[name]))
        with _named(name):
            return (
                int(self.tensor(name).sum()) if spec["encoding"] == "bits" else encodings.check(spec, self.parts[name])
            )

    def check(self) -> None:
        """Every encoding, one after the other, without a dense tensor. ValueError as :meth:`tensor`."""
        for name, spec in self.structure.encoded.items():
            with _named(name):
                if spec["encoding"] != "bits":
                    encodings.check(spec, self.parts[name])
                else:
                    encodings.unpack_bits(self.parts[name]["index"], self.nbytes(name))
            self.forget(name)

    def forget(self, name: str) -> None:
        """Gives back the memory into which a tensor of the file was read; it is read again where it is wanted."""
        if self.mapped is not None:
            self.mapped.forget([name, *(f"{name}::{part}" for part in self.parts.get(name, {}))])

    def tensor(self, name: str) -> Tensor:
        """Decoded. Compare :meth:`shape` with what is expected first: it alone says how much memory this takes."""
        spec = self.structure.encoded.get(name)
        if spec is None:
            return self.plain[name]
        with _named(name):
            if spec["encoding"] != "bits":
                return encodings.decode(spec, self.parts[name])
            count = self.nbytes(name)
            return encodings.unpack_bits(self.parts[name]["index"], count).view(spec["shape"])


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of a tensor before a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{names([name])}: {error}") from None


def write(state: State, path: str | os.PathLike[str], value_dtype: str) -> None:
    """Writes ``state`` with every pruned weight in its smallest encoding; see :func:`sparseprune.save`."""
    check_value_dtype(value_dtype)
    with about(path):
        _refuse_folder_of_others(path)
    structure = state.structure
    pruned = {prefixed(fqn, "weight") for fqn in structure.linears}
    factors = {prefixed(fqn, name) for fqn in structure.sparse for name in FACTORS}
    taken = {name.rpartition("::")[0] for name in state.tensors}
    tensors: dict[str, Tensor] = {}
    structure.encoded = {}
    for name, tensor in state.tensors.items():
        if name in taken:  # another tensor is called as a part of this one would be
            tensors[name] = tensor
            continue
        if tensor.dtype == torch.bool:
            structure.encoded[name] = bits_spec(list(tensor.shape))
            tensors[f"{name}::index"] = encodings.pack_bits(tensor)
            continue
        matrix = tensor.dim() == 2 and max(tensor.shape) <= encodings.LARGEST and name not in factors
        if matrix and str(tensor.dtype).removeprefix("torch.") in encodings.DTYPES:
            rounds = name in pruned or not structure.linears
            made = _encoded(name, tensor, value_dtype if rounds else "float32", structure)
            if made is not None:
                structure.encoded[name] = made.spec()
                tensors.update({f"{name}::{part}": value for part, value in made.tensors.items()})
                continue
        tensors[name] = tensor
    tensors = _apart(tensors)
    text = structure.to_json()
    metadata = {"format": FORMAT, "version": str(VERSION), "structure": text, "digest": digest(tensors, text)}
    _write_file(tensors, metadata, path)


def write_plain(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state dict as every reader of safetensors knows it."""
    _write_file(_apart(tensors), {"format": "pt"}, path)


def _refuse_folder_of_others(path: str | os.PathLike[str]) -> None:
    given = os.path.expanduser(path)
    for place in (Path(given), Path(os.path.realpath(given))):
        beside = _OTHERS.get(place.name)
        if beside is not None and os.path.exists(place.parent / beside):
            raise CheckpointError(
                f"{path}: expected a name of its own, got that of the weights that {beside} beside it belongs to: "
                "another library would load it as such, and fill the pruned layers with random numbers; use "
                f"{place.parent / 'pruned.safetensors'}, or sparseprune.densify_(model) and its own saving"
            )


def _encoded(name: str, tensor: Tensor, value_dtype: str, structure: Structure) -> encodings.Encoded | None:
    """The sparse encoding of one matrix; None where it is not pruned or dense is smaller."""
    how = structure.sparse.get(name.removesuffix(".weight"), {})
    if value_dtype == INFERENCE:
        value_dtype = how.get("value_dtype", "float32")
    if not tensor.numel() or bool((tensor != 0).all()):
        return None
    if float((tensor == 0).float().mean()) < _PRUNED:
        value_dtype = "float32"
    extra = [tuple(how["blocksize"])] if how.get("blocksize") else []
    try:
        made = encodings.encode(
            tensor, None if value_dtype == "float32" else value_dtype, extra, how.get("activations") == "int8"
        )
    except ValueError as error:
        raise CheckpointError(f"save: {name}: {error}") from None
    return made if made.nbytes < tensor.numel() * tensor.element_size() else None


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors in memory of the CPU of which no two share memory, as the file format wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        where = tensor.untyped_storage().data_ptr()
        if where in seen or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def _write_file(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    if "__metadata__" in tensors:  # it would be written, and no reader take the file
        raise CheckpointError(f"{path}: could not be written: '__metadata__' is the file format's own name; rename it")
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
            with open(temporary, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
            if header > _LARGEST_HEADER:
                raise ValueError(f"names and structure expected up to {_LARGEST_HEADER} bytes, got {header}")
    except KeyError as error:
        raise CheckpointError(f"{path}: could not be written: dtype {error} has no name in the file format") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: could not be written, nothing is left behind: {error}") from None


def digest(tensors: Mapping[str, Tensor], structure: str, done: Callable[[str], None] = lambda name: None) -> str:
    """SHA-256, in hex, over the structure's text and every tensor's name, dtype, shape and bytes. Against damage: who
    alters a file can make it anew. done: told of each tensor once it was read.
    """
    found = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        done(name)
    return found.hexdigest()


def read(path: str | os.PathLike[str], plain: bool = False) -> Content:
    """Reads a file; ``plain``: a state dict that this library did not write will do. CheckpointError on all that is
    wrong with the file itself but the content of encodings, which :class:`Content` checks as it decodes. Takes memory
    for the file, whatever sizes it declares.
    """
    metadata, mapped = _stored(path)
    tensors = mapped.tensors
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    with about(path):
        if metadata.get("format") != FORMAT:
            if any(name.endswith("::spec") for name in tensors):
                raise ValueError(
                    f"expected a file by sparseprune.save{' or a dense one' if plain else ''}, got weights of a folder "
                    "that save_pretrained wrote, which are encoded; sparseprune.load(FOLDER) reads it, and "
                    "`sparseprune export FOLDER OTHER --dense` makes it dense"
                )
            if plain:
                return Content(plain=tensors, sizes=sizes)
            raise ValueError(
                f"expected a checkpoint of format {FORMAT!r}, got {encodings.shown(metadata.get('format'))}; "
                "`sparseprune convert` makes one of a dense file"
            )
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"expected format version {VERSION}, got {encodings.shown(metadata.get('version'))}; use the "
                "sparseprune that wrote it"
            )
        text = metadata.get("structure", "")
        if digest(tensors, text, lambda name: mapped.forget([name])) != metadata.get("digest"):
            raise ValueError("its digest does not match its content; the file was altered or damaged")
        content = Content(Structure.from_json(text), mapped=mapped)
        for name, tensor in tensors.items():
            whole, separator, part = name.rpartition("::")
            if separator and whole in content.structure.encoded:
                content.parts.setdefault(whole, {})[part] = tensor
            else:
                whole, content.plain[name] = name, tensor
            content.sizes[whole] = content.sizes.get(whole, 0) + sizes[name]
        _check_encoded(content)
        for name, other in content.structure.ties.items():
            if other not in content.sizes or name in content.sizes:
                raise ValueError(
                    f"structure: {names([name])} expected to share a tensor of the file, got {encodings.shown(other)}"
                )
        _check_factors(content)
        return content


def _check_encoded(content: Content) -> None:
    for name, spec in content.structure.encoded.items():
        if name in content.plain:
            raise ValueError(f"structure: {names([name])} expected one encoding, got a plain tensor too")
        parts = content.parts.get(name, {})
        if not parts or (spec["encoding"] == "bits" and set(parts) != {"index"}):
            raise ValueError(f"{names([name])}: {spec['encoding']} expected its tensors, got {sorted(parts)}")


def _check_factors(content: Content) -> None:
    """ValueError where low-rank factors do not fit each other and the weight of their layer."""
    there = set(content.names())
    for fqn in content.structure.sparse:
        found = {name: content.shape(prefixed(fqn, name)) for name in FACTORS if prefixed(fqn, name) in there}
        if not found:
            continue
        weight = prefixed(fqn, "weight")
        shape = content.shape(weight) if weight in there else ()
        if len(shape) != 2:
            raise ValueError(f"{names([weight])}: expected a matrix beside low-rank factors, got {list(shape)}")
        rank = (found.get("low_rank_a") or (0,))[0]
        if found != {"low_rank_a": (rank, shape[1]), "low_rank_b": (shape[0], rank)}:
            raise ValueError(
                f"{names([fqn])}: low_rank_a, low_rank_b expected [r, {shape[1]}] and [{shape[0]}, r], got {found}; "
                "write the file again with sparseprune.save"
            )
        kinds = {content.dtype(prefixed(fqn, name)) for name in found}
        if len(kinds) != 1 or not all(kind.is_floating_point for kind in kinds):
            raise ValueError(f"{names([fqn])}: low_rank_a, low_rank_b expected one floating dtype, got {kinds}")
        if rank > max(shape) and any(prefixed(fqn, name) in content.structure.encoded for name in found):
            raise ValueError(f"{names([fqn])}: low_rank_a expected a rank up to {max(shape)}, got {rank}")


def _stored(path: str | os.PathLike[str]) -> tuple[dict[str, str], MappedFile]:
    """Metadata and tensors of any safetensors file, their shapes and dtypes checked before a tensor is made."""
    try:
        place = Path(path).expanduser()
        mode = place.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a checkpoint, found no such file") from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a null byte in the name, ~nobody
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not place.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint, a regular file, found {kind_of(mode)}")
    try:
        with safe_open(place, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                lazily = file.get_slice(name)
                check_shape(lazily.get_shape())
                if lazily.get_dtype() not in DTYPES:
                    raise ValueError(f"{names([name])} has dtype {lazily.get_dtype()}, which torch does not know")
            metadata = file.metadata() or {}
        return metadata, MappedFile(place)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); it is truncated or damaged") from None
