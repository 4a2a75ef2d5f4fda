"""Where every buffer lies in the arena, and which copies are not needed.

A copy that does nothing but put all of an array into a part of another one goes: whatever makes the array writes it
there at once. Nothing ever writes a place twice, so this is always right.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from affect_export.native.builder import Builder, Ref, Step
from affect_export.native.program import (
    FIELDS,
    WRITES,
    Field,
    Instruction,
    Op,
    Operand,
    Place,
    Program,
    align,
)
from affect_export.native.views import Buffer

__all__ = ["place"]


def place(builder: Builder) -> Program:
    """The finished program."""
    steps = _drop_dead(_without_copies(builder.steps))
    offsets, arena = _arrange(steps)
    used: dict[int, int] = {}  # constants: what is not used any more is left out
    made = []
    for step in steps:
        fields: dict[str, Field] = {
            name: _operand(value, offsets, used) if isinstance(value, Ref) else value
            for name, value in step.fields.items()
        }
        made.append(Instruction(step.op, step.flags, fields))
    return Program(builder.inputs, builder.outputs, tuple(made), tuple(builder.constants[c] for c in used), arena)


def _operand(ref: Ref, offsets: dict[int, int], used: dict[int, int]) -> Operand:
    if ref.buffer.place is Place.ARENA:
        return Operand(Place.ARENA, 0, offsets[id(ref.buffer)] + ref.offset)
    if ref.buffer.place is Place.CONSTANT:
        return Operand(Place.CONSTANT, used.setdefault(ref.buffer.number, len(used)), ref.offset)
    return Operand(ref.buffer.place, ref.buffer.number, ref.offset)


def _refs(step: Step) -> Iterator[tuple[str, Ref]]:
    for name in FIELDS[step.op]:
        value = step.fields.get(name)
        if isinstance(value, Ref):
            yield name, value


def _without_copies(steps: list[Step]) -> list[Step]:
    moved: dict[int, Ref] = {}

    def now(ref: Ref) -> Ref:
        while (to := moved.get(id(ref.buffer))) is not None:
            ref = Ref(to.buffer, to.offset + ref.offset)
        return ref

    kept = []
    for step in steps:
        if step.op is Op.COPY and (size := _moved_whole(step)) is not None:
            x, y = step.fields["x"], step.fields["y"]
            assert isinstance(x, Ref) and isinstance(y, Ref)
            x, y = now(x), now(y)
            if x.buffer.place is Place.ARENA and x.offset == 0 and x.buffer.size == size and x.buffer is not y.buffer:
                piece = y.buffer.piece
                if y.buffer.pieces == 1 or y.offset // piece == (y.offset + size - 1) // piece:
                    moved[id(x.buffer)] = y
                    continue
        kept.append(step)
    return [Step(s.op, s.flags, {k: now(v) if isinstance(v, Ref) else v for k, v in s.fields.items()}) for s in kept]


def _moved_whole(step: Step) -> int | None:
    """Bytes, where a copy moves elements that follow one another to where they do so again."""
    size = 1
    for axis in reversed(range(6)):
        n = step.fields[f"size{axis}"]
        assert isinstance(n, int)
        if n > 1 and not step.fields[f"x_stride{axis}"] == step.fields[f"y_stride{axis}"] == size:
            return None
        size *= n
    width = step.fields["bytes"]
    assert isinstance(width, int)
    return size * width


def _drop_dead(steps: list[Step]) -> list[Step]:
    """Without what nothing reads."""
    read: set[int] = set()
    kept = []
    for step in reversed(steps):
        written = [r.buffer for name, r in _refs(step) if name in WRITES and name != "scratch"]
        if not any(b.place is Place.OUTPUT or id(b) in read for b in written):
            continue
        read.update(id(r.buffer) for name, r in _refs(step) if name not in WRITES)
        kept.append(step)
    return kept[::-1]


@dataclass
class _Life:
    buffer: Buffer
    first: int
    last: int


def _arrange(steps: list[Step]) -> tuple[dict[int, int], int]:
    """Byte offset of each buffer, and the arena's size: the largest first, each at the lowest place that is free."""
    lives: dict[int, _Life] = {}
    for number, step in enumerate(steps):
        for _, ref in _refs(step):
            if ref.buffer.place is Place.ARENA:
                life = lives.setdefault(id(ref.buffer), _Life(ref.buffer, number, number))
                life.last = number
    offsets: dict[int, int] = {}
    placed: list[_Life] = []
    arena = 0
    for life in sorted(lives.values(), key=lambda v: (-v.buffer.size, v.first)):
        at = 0
        size = life.buffer.size + life.buffer.slack
        others = [p for p in placed if p.first <= life.last and life.first <= p.last]
        for other in sorted(others, key=lambda p: offsets[id(p.buffer)]):
            start = offsets[id(other.buffer)]
            if at + size <= start:
                break
            at = max(at, align(start + other.buffer.size + other.buffer.slack))
        offsets[id(life.buffer)] = at
        placed.append(life)
        arena = max(arena, align(at + size))
    return offsets, arena
