"""Groups of channels, and the affine map behind a norm."""


def num_groups(channels: int, groups: int, *, usual: int = 32) -> int:
    """`groups`, or for 0 the largest divisor of `channels` that is at most `usual` and leaves 4 channels to a group.

    Raises:
        ValueError: `groups` does not divide the channels.
    """
    if groups:
        if channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels; set groups to a divisor, or to 0")
        return groups
    return max(n for n in range(1, min(usual, max(channels // 4, 1)) + 1) if channels % n == 0)
