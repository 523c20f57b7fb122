"""Labels and times for people."""

import math


def plain(label: str) -> str:
    """A label without the underscores that stand for spaces."""
    return label.replace("_", " ")


def minutes(seconds: float, digits: int = 0) -> str:
    """A time as players show it, "1:05", with some digits behind the second."""
    units = 10**digits
    whole = math.floor(seconds * units + 0.5)
    return f"{whole // (60 * units)}:{whole % (60 * units) / units:0{3 + digits if digits else 2}.{digits}f}"


def clock(seconds: float) -> str:
    """A length of time."""
    whole, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if whole == 0 else f"{whole} min{f' {rest} s' if rest else ''}"
