"""The positions that an intervention edits, as a config says them: `"f7+l7"`."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

_TERM = re.compile(r"(?P<kind>f|l)(?P<count>[0-9]+)|(?P<word>all|decode)")


@dataclass(frozen=True)
class Positions:
    """A set of positions of a prompt and, with `decode`, of what is generated after it.

    Grammar: terms joined by `+`, each at most once.

    | term | positions |
    |---|---|
    | `f{n}` | the first n attended prompt tokens |
    | `l{n}` | the last n attended prompt tokens |
    | `all` | all prompt tokens |
    | `decode` | every token after the prompt |

    or a list of explicit prompt positions, negative ones counted from the prompt's end.

    A prompt of n tokens that is shorter than p + s, for f{p}+l{s}, is edited at its first
    min(p, ⌊n/2⌋) and last min(s, ⌈n/2⌉) tokens (ReFT, arXiv:2404.03592, section 4.1).
    """

    first: int = 0
    last: int = 0
    all: bool = False
    decode: bool = False
    indices: tuple[int, ...] = ()

    @classmethod
    def parse(cls, spec: "str | Sequence[int] | Positions") -> "Positions":
        """Read positions; a ValueError names what was expected and the column."""
        if isinstance(spec, Positions):
            return spec
        if not isinstance(spec, str):
            return cls._from_indices(spec)
        terms: dict[str, int | bool] = {}
        column = 0
        for part in spec.split("+"):
            term = _TERM.match(part)
            if term is None:
                raise _syntax_error(spec, column, "terms like 'f7', 'l7', 'all' or 'decode'")
            field = {"f": "first", "l": "last"}.get(term["kind"]) or term["word"]
            if field in terms:
                raise _syntax_error(spec, column, f"{term[0][0] if term['kind'] else field} once")
            if term["kind"] and int(term["count"]) == 0:
                raise _syntax_error(spec, column + 1, "a count of at least 1")
            terms[field] = int(term["count"]) if term["kind"] else True
            if term.end() < len(part):
                expected = "terms like 'f7' or 'l7' joined by '+'"
                raise _syntax_error(spec, column + term.end(), expected)
            column += len(part) + 1
        positions = cls(**terms)  # type: ignore[arg-type]  # field names and types match
        if positions.all and (positions.first or positions.last):
            raise ValueError(f"positions {spec!r}: 'all' includes the first and last tokens")
        return positions

    @classmethod
    def _from_indices(cls, spec: Sequence[int]) -> "Positions":
        is_list = isinstance(spec, Sequence) and not isinstance(spec, bytes)
        if not is_list or not spec or not all(type(i) is int for i in spec):
            raise ValueError(
                f"positions {spec!r}: expected a string such as 'f7+l7' or a list of integers"
            )
        if len(set(spec)) < len(spec):
            raise ValueError(f"positions {list(spec)}: every index may occur once")
        return cls(indices=tuple(spec))

    def spec(self) -> str | list[int]:
        """What `parse` reads back: a string, or the list of indices."""
        if self.indices:
            return list(self.indices)
        counts = [f"{c}{n}" for c, n in (("f", self.first), ("l", self.last)) if n]
        return "+".join(counts + [w for w in ("all", "decode") if getattr(self, w)])

    def only(self, names: Collection[str]) -> "Positions":
        """The positions of these fields alone: `first`, `last`, `all`, `decode`, `indices`."""
        return Positions(**{name: getattr(self, name) for name in names})

    def split(self) -> "list[Positions]":
        """The prefix and the rest, which an untied entry edits with weights of their own."""
        if not (self.first and self.last):
            return [self]
        return [Positions(first=self.first), replace(self, first=0)]

    def overlaps(self, other: "Positions") -> bool:
        """Whether some prompt has a token that both positions contain."""
        if self.decode and other.decode:
            return True
        if self.indices and other.indices:
            same_end = {i < 0 for i in self.indices + other.indices}
            return len(same_end) > 1 or bool(set(self.indices) & set(other.indices))
        if self.all or other.all or self.indices or other.indices:
            return self.edits_prompt and other.edits_prompt
        return bool((self.first and other.first) or (self.last and other.last))

    @property
    def edits_prompt(self) -> bool:
        """Whether there are positions in the prompt."""
        return bool(self.first or self.last or self.all or self.indices)


POSITION_FIELDS = tuple(field.name for field in fields(Positions))


def _syntax_error(spec: str, column: int, expected: str) -> ValueError:
    got = repr(spec[column]) if column < len(spec) else "the end"
    return ValueError(f"positions {spec!r}: expected {expected}, got {got} at column {column + 1}")
