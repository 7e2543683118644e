"""Numbers for the entries of the IQ2_XS, IQ2_S and IQ3_S grids: prints csrc/formats/grid_numbers.h.

Packed tiles name entries by numbers of our own, so that each half of an entry is found in fewer tables than entries
fill (`csrc/isa/codebook.h` says where). That takes disjoint products of halves: 2 first halves x 2 second halves all of
whose 4 combinations are entries, and 4 x 4. A greedy search, rare halves first, finds more than are needed.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "csrc/formats/grids.cpp"
Entry = tuple[int, int]  # first half, second half
Product = tuple[list[int], list[int]]


def published(name: str) -> list[Entry]:
    """The entries of a grid in their published order."""
    match = re.search(rf"constexpr uint16_t {name}\[\d+\] = {{(.*?)}};", SOURCE.read_text(), re.DOTALL)
    assert match is not None
    return [(int(word, 16) & 255, int(word, 16) >> 8) for word in re.findall(r"0x[0-9a-f]+", match[1])]


def neighbours(entries: set[Entry], side: int) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for entry in sorted(entries):
        found.setdefault(entry[side], set()).add(entry[1 - side])
    return found


def one_product(entries: set[Entry], size: int, rng: random.Random) -> Product | None:
    """As many first and second halves as `size` says, all combinations of which are entries."""
    seconds, firsts = neighbours(entries, 0), neighbours(entries, 1)
    for first in sorted(seconds, key=lambda half: (len(seconds[half]), rng.random())):
        common, chosen = seconds[first], [first]
        while len(chosen) < size and len(common) >= size:
            others = [half for half in seconds if half not in chosen and len(common & seconds[half]) >= size]
            if not others:
                break
            best = min(others, key=lambda half: (-min(len(common & seconds[half]), size + 2), len(seconds[half])))
            chosen.append(best)
            common = common & seconds[best]
        if len(chosen) == size and len(common) >= size:
            return chosen, sorted(common, key=lambda half: (len(firsts[half]), half))[:size]
    return None


def products(entries: set[Entry], size: int, count: int) -> list[Product]:
    """`count` disjoint products; takes their entries out of the set."""
    found: list[Product] = []
    rng = random.Random(0)
    while len(found) < count:
        product = one_product(entries, size, rng)
        if product is None:
            raise SystemExit(f"only {len(found)} of {count} products of {size} x {size}")
        found.append(product)
        entries -= {(first, second) for first in product[0] for second in product[1]}
    return found


def numbered(entries: list[Entry]) -> list[Entry]:
    """The entries by number."""
    left, out = set(entries), [(-1, -1)] * len(entries)
    start = len(entries) - 512
    for r, (firsts, seconds) in enumerate(products(left, 4, 32) if start else []):
        for number in range(16):
            out[number % 4 | r << 2 | number // 4 << 7] = firsts[number // 4], seconds[number % 4]
    for r, (firsts, seconds) in enumerate(products(left, 2, 96)):
        for number in range(4):
            at = number % 2 | r % 32 << 1 | number // 2 << 6 | r // 32 << 7
            out[start + at] = firsts[number // 2], seconds[number % 2]
    out[start + 384 :] = sorted(left)
    return out


def main() -> None:
    print("// Made by scripts/number_grids.py: the place in the published grid of the entry with each number in tiles.")
    print("#pragma once\n\n#include <stdint.h>\n\nnamespace moesaic {\n\n// clang-format off")
    for name in ("Iq2Xs", "Iq2S", "Iq3S"):
        entries = published(f"k{name}")
        places = {entry: place for place, entry in enumerate(entries)}
        numbers = [places[entry] for entry in numbered(entries)]
        print(f"constexpr uint16_t k{name}Places[{len(numbers)}] = {{")
        for row in range(0, len(numbers), 20):
            print("    " + ", ".join(str(number) for number in numbers[row : row + 20]) + ",")
        print("};")
    print("// clang-format on\n\n}  // namespace moesaic")


if __name__ == "__main__":
    main()
