"""The schema of a checkpoint's state.json. The file is untrusted: all of it is checked before any of it is used.

A state that passes names nothing outside its folder, gives every element of every parameter exactly one place, and
claims no more elements than its files have bytes for, so reading it allocates no more memory than it takes on disk.
"""

import hashlib
import json
import math
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

FORMAT = 3
MAX_BYTES = 2**28  # of state.json; ViT-g/16 at ZeRO-3 on 1024 ranks needs about 60 MB

Number = Annotated[int, Field(ge=0, lt=2**53)]
Natural = Annotated[int, Field(ge=1, lt=2**53)]
Label = Annotated[str, StringConstraints(max_length=100)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,200}$")]


class _Checked(BaseModel):
    # Keys that are not declared here are kept as they are.
    model_config = ConfigDict(strict=True, extra="allow")


class Piece(NamedTuple):
    """Elements [start, start + length) of a parameter, at `offset` in the `flat`-th flat tensors of a file."""

    name: Name
    start: Number
    length: Natural
    flat: Number
    offset: Number


class File(_Checked):
    name: Annotated[str, StringConstraints(pattern=r"^rank-[0-9]{5}\.safetensors$")]
    bytes: Number
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    pieces: list[Piece]


class State(_Checked):
    format: Literal[3]
    step: Number
    applied: Number
    samples: Number
    skipped: Number
    moments: bool = False  # whether there are moments and an average though no step was applied (jepa.state.initial)
    steps_per_epoch: Natural
    fingerprint: Annotated[dict[Label, Number | Label], Field(max_length=20)]  # `Config.fingerprint`
    config: dict[str, Any]  # `parse_config` checks it
    versions: dict[str, str]
    averaged: list[Label] = ["encoder"]  # the submodules whose parameters have an average
    shapes: dict[Name, Annotated[list[Natural], Field(max_length=8)]]
    files: Annotated[list[File], Field(min_length=1)]

    @model_validator(mode="after")
    def _every_element_has_one_place(self) -> "State":
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("a file is listed twice")
        stretches: dict[Any, list[tuple[int, int]]] = {name: [] for name in self.shapes}
        places: dict[Any, list[tuple[int, int]]] = {}
        for file in self.files:
            for piece in file.pieces:
                if piece.name not in self.shapes:
                    raise ValueError(f"{file.name} holds {piece.name}, which is not in shapes")
                if 4 * (piece.offset + piece.length) > file.bytes:
                    raise ValueError(f"{file.name} is too small for its piece of {piece.name}")
                stretches[piece.name].append((piece.start, piece.start + piece.length))
                places.setdefault((file.name, piece.flat), []).append((piece.offset, piece.offset + piece.length))
        for name, shape in self.shapes.items():
            edges = [(0, 0), *sorted(stretches[name]), (math.prod(shape),) * 2]
            if any(end != begin for (_, end), (begin, _) in pairwise(edges)):
                raise ValueError(f"the pieces of {name} do not cover its {math.prod(shape)} elements exactly once")
        for (file_name, index), taken in places.items():
            if any(end > begin for (_, end), (begin, _) in pairwise(sorted(taken))):
                raise ValueError(f"two pieces overlap in the flat tensors {index} of {file_name}")
        return self


def seal(state: dict[str, Any]) -> str:
    """The text of state.json: the state and, as its last key, the SHA-256 of the JSON without that key."""
    text = json.dumps({key: value for key, value in state.items() if key != "sha256"})
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def is_sealed(text: bytes) -> bool:
    """Whether the text is bit for bit as `seal` wrote it."""
    content, _, rest = text.rpartition(b', "sha256": "')
    return rest.decode(errors="replace") == hashlib.sha256(content + b"}").hexdigest() + '"}'
