"""Buckets: the few static sizes of an axis."""


def sizes(least: int, most: int, factor: int) -> list[int]:
    """The buckets: least, factor x least, factor^2 x least, ... and most."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return [*found, most]


def bucket(size: int, among: list[int]) -> int:
    """The smallest bucket that fits `size`, or else the largest."""
    return next((other for other in among if other >= size), among[-1])
