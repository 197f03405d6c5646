"""Lists and ranges as llama-bench reads them: `1,2,4`, `1-4`, `512-4096*2`, `0-8192+2048`."""

import re

import click

MOST = 1000


class Numbers(click.ParamType):
    """A tuple of whole numbers; `least` is the smallest one allowed."""

    name = "N,..."

    def __init__(self, least: int = 0):
        self.least = least

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found = [number for part in value.split(",") for number in self._range(part, param, ctx)]
        if len(found) > MOST:
            self.fail(f"{value!r} are {len(found)} numbers; {MOST} at most", param, ctx)
        return tuple(found)

    def _range(self, part: str, param, ctx) -> list[int]:
        read = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?", part.strip())
        if not read:
            self.fail(f"{part!r} is not of the form 512, 1-4, 0-8192+2048 or 512-4096*2", param, ctx)
        first, last, how, step = int(read[1]), int(read[2] or read[1]), read[3] or "+", int(read[4] or 1)
        if first < self.least:
            self.fail(f"{part!r} begins below {self.least}", param, ctx)
        if last < first or step < 1 or (how == "*" and (step < 2 or first < 1) and last > first):
            self.fail(f"{part!r} never ends", param, ctx)
        if how == "+":
            if (last - first) // step >= MOST:
                self.fail(f"{part!r} are more than {MOST} numbers", param, ctx)
            return list(range(first, last + 1, step))
        numbers = [first]
        while (number := numbers[-1] * step) <= last and step > 1:
            numbers.append(number)
        return numbers


class Pair(click.ParamType):
    """`512,128`: tokens of a prompt and tokens after it."""

    name = "PP,TG"

    def convert(self, value, param, ctx) -> tuple[int, int]:
        read = re.fullmatch(r"(\d{1,9}),(\d{1,9})", value)
        if not read or not int(read[1]) or not int(read[2]):
            self.fail(f"{value!r} is not of the form 512,128", param, ctx)
        return int(read[1]), int(read[2])


class Names(click.ParamType):
    """Names with commas between them, all of them among `allowed` where that is known."""

    name = "NAME,..."

    def __init__(self, allowed: tuple[str, ...] = ()):
        self.allowed = allowed

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(","))
        bad = next((name for name in names if not name or (self.allowed and name not in self.allowed)), None)
        if bad is not None:
            self.fail(f"{bad!r} is none of {', '.join(self.allowed) or 'what there is'}", param, ctx)
        return names
