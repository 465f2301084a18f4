"""A backbone's stages and the pyramid behind it, told by the maps that modules pass on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from .trace import Call, FeatureMap, Shape, passes_on, pools_all, stride_of

FINEST = 4.0  # stride of a pyramid's first level


@dataclass(frozen=True)
class Spot:
    """A feature map, and the call that puts it out."""

    call: Call
    map: FeatureMap

    @property
    def key(self) -> tuple[int, tuple[str, ...]]:
        return self.call.began, self.map.keys


@dataclass(frozen=True)
class Forward:
    """The calls of one forward, nested and in the order of ending, for an image of this shape."""

    root: Call
    ended: list[Call]
    pixels: Shape

    @cached_property
    def runs(self) -> Counter[str]:
        return Counter(call.path for call in self.ended)

    @cached_property
    def model(self) -> Call:
        """The model's call; of a wrapper, which passes all on, the call of what is wrapped."""
        outermost = call = self.root.inner[0] if self.root.inner else self.root
        while len(call.inner) == 1 and passes_on(call, call.inner[0]):
            (call,) = call.inner
        return call if len(call.inner) > 1 else outermost

    def stride(self, found: FeatureMap) -> float:
        return stride_of(found.shape, self.pixels)

    def can_be_tapped(self, call: Call) -> bool:
        return self.runs[call.path] == 1

    def stages(self, steps: list[Call]) -> dict[float, Spot]:
        """The last step at each stride, or the item of a list of the backbone's maps."""
        found: dict[float, Spot] = {}
        for step in steps:
            (put_out,) = step.put_out
            stride = self.stride(put_out)
            before = found.get(stride)
            # What holds other stages, or wraps its output, adds nothing to the same tensor.
            if before and before.map.serial == put_out.serial:
                holds = any(s.call.began >= step.began for s in found.values() if s != before)
                if holds or put_out.keys:
                    continue
            if stride > 1 and self.can_be_tapped(step):
                found[stride] = Spot(step, put_out)
        deepest = max((self.stride(step.put_out[0]) for step in steps), default=0.0)
        for call in self.ended:
            if not self.can_be_tapped(call) or len(call.taken_in) != 1:
                continue
            for group in _groups(call.put_out):
                strides = [self.stride(item) for item in group]
                if strides != sorted(strides) or strides[-1] != deepest:
                    continue
                items = {self.stride(item): Spot(call, item) for item in group}
                for stride, spot in items.items():
                    if stride > 1 and (
                        stride not in found or self.is_patch_projection(found[stride])
                    ):
                        found[stride] = spot
        return found

    def is_patch_projection(self, spot: Spot) -> bool:
        """Whether it is one strided layer (normalised, activated) with token blocks behind it."""
        images, channels, height, width = spot.map.shape
        taken_in = spot.call.taken_in
        shrinks = bool(taken_in) and self.stride(taken_in[0]) < self.stride(spot.map)
        return (
            shrinks
            and spot.call.leaves <= 3
            and any(
                (shape[0], shape[2]) == (images, channels) and shape[1] >= height * width
                for call in self.ended
                if call.inner and call.began >= spot.call.ended
                for shape in call.tokens_in & call.tokens_out
            )
        )

    def steps(self) -> list[Call]:
        """The backbone's steps in order, each followed by the calls that end with it."""
        steps: list[Call] = []
        parts: list[Call] = []
        deepest = 0.0

        def walk(call: Call) -> bool:
            """Whether the backbone goes on after this call."""
            nonlocal deepest
            if len(call.taken_in) > 1 or pools_all(call) or self._is_head(call, deepest):
                return False
            stride = self.stride(call.put_out[0]) if len(call.put_out) == 1 else 0.0
            before = self.stride(call.taken_in[0]) if call.taken_in else 1.0
            # What keeps or halves its map is one step, whatever is inside.
            inside = call is not self.model
            if stride and inside and (not call.inner or 1 < stride <= 2 * before):
                if stride < deepest:
                    return False
                deepest = stride
                parts.append(call)
                steps.append(call)
                return True
            # A block on tokens, which come of an earlier map: one inside is a branch's.
            on_tokens = call.tokens_in and call.tokens_out and not call.taken_in
            if deepest and on_tokens and not call.put_out:
                return True
            if not all(map(walk, call.inner)):
                return False
            if call.inner and inside and 0 < stride == deepest:
                steps.append(call)
            return len(call.put_out) < 2

        walk(self.model)
        seam = self._seam(parts, deepest)
        return [step for step in steps if seam is None or step.began < seam.ended]

    def _seam(self, steps: list[Call], deepest: float) -> Call | None:
        """The module that the image enters and that holds most of the backbone, to its end.

        What follows it at its stride is a head.
        """
        whole = sum(step.leaves for step in steps)
        for call in self.model.within():
            if call is self.model or not (call.taken_in and call.put_out):
                continue
            ends = self.stride(call.taken_in[0]), self.stride(call.put_out[-1])
            if ends == (1.0, deepest):
                held = sum(step.leaves for step in steps if call.began <= step.began < call.ended)
                if 2 * held > whole:
                    return call
        return None

    def _is_head(self, call: Call, deepest: float) -> bool:
        """Whether it takes in the backbone's last map, puts out none and shrinks none further."""
        if not call.inner or call.put_out or len(call.taken_in) != 1:
            return False
        inside = [item for inner in call.within() for item in inner.put_out]
        return 1 < deepest == self.stride(call.taken_in[0]) and all(
            item.shape[2:] == (1, 1) or self.stride(item) <= deepest for item in inside
        )

    def pyramid(self, steps: list[Call]) -> dict[float, Spot]:
        """What an FPN puts out; else what enters a head together.

        An FPN is one module, which puts out one width or runs behind the backbone. Its maps are
        none of the backbone's, and all enter modules that run later; so they are not a head's.
        Of a model without a head they are what it puts out.
        """
        stages = {step.put_out[0].serial for step in steps}
        last = max((step.ended for step in steps), default=0)
        # The last that each map enters.
        enters = {item.serial: call.began for call in self.root.within() for item in call.taken_in}
        pyramids = [
            call
            for call in self.ended
            if self._levels(call.put_out)
            and self.can_be_tapped(call)
            and (call.began >= last or len({item.shape[1] for item in call.put_out}) == 1)
            and stages.isdisjoint(item.serial for item in call.put_out)
            and all(enters.get(item.serial, 0) >= call.ended for item in call.put_out)
        ]
        if not pyramids:
            return self._enters_a_head(last) or self._put_out(stages)
        fpn = pyramids[0]
        for call in pyramids:
            serials = {item.serial for item in fpn.put_out}
            # A head takes the pyramid in and passes none on.
            in_a_head = any(
                outer.began < call.began < outer.ended
                and serials.issubset(item.serial for item in outer.taken_in)
                for outer in self.ended
                if outer not in pyramids
            )
            if not in_a_head:
                fpn = call
        return {stride: Spot(fpn, item) for stride, item in self._levels(fpn.put_out).items()}

    def _put_out(self, stages: set[int]) -> dict[float, Spot]:
        """An FPN's maps at the end of a model, each out of a layer; finer ones are logits."""
        (call,) = self.root.inner
        made = {item.serial for inner in self.ended if not inner.inner for item in inner.put_out}
        levels = self._levels(call.put_out)
        widths = {item.shape[1] for item in call.put_out}
        of_layers = all(item.serial in made - stages for item in call.put_out)
        if len(widths) != 1 or not of_layers or min(levels, default=0.0) < FINEST:
            return {}
        return {stride: Spot(call, item) for stride, item in levels.items()}

    def _enters_a_head(self, last: int) -> dict[float, Spot]:
        sources = {
            item.serial: Spot(call, item)
            for call in self.ended
            for item in call.put_out
            if call.began >= last and self.can_be_tapped(call) and not item.keys
        }
        found: dict[float, Spot] = {}
        for call in sorted(self.ended, key=lambda call: call.began):
            levels = self._levels(call.taken_in)
            # What puts out one map fuses its inputs.
            if levels and len(call.put_out) != 1:
                spots = {stride: sources.get(item.serial) for stride, item in levels.items()}
                if all(spots.values()):
                    found = {stride: spot for stride, spot in spots.items() if spot}
        return found

    def _levels(self, maps: list[FeatureMap]) -> dict[float, FeatureMap]:
        """The maps by stride if they lie side by side and halve from level to level."""
        if len({item.keys[:-1] for item in maps}) > 1:
            return {}
        # Of several at a stride the larger, then the last.
        maps = sorted(maps, key=lambda item: (self.stride(item), math.prod(item.shape[2:])))
        levels = {self.stride(item): item for item in maps}
        halve = all(fine * 2 == coarse for fine, coarse in pairwise(levels))
        powers = all(math.log2(stride).is_integer() for stride in levels)
        return levels if len(levels) > 1 and halve and powers else {}


def _groups(maps: Iterable[FeatureMap]) -> Iterator[list[FeatureMap]]:
    """The items of each list, tuple or mapping in a structure."""
    groups: dict[tuple[str, ...], list[FeatureMap]] = {}
    for item in maps:
        if item.keys:
            groups.setdefault(item.keys[:-1], []).append(item)
    yield from groups.values()
