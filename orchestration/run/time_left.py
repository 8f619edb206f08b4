"""How long something still takes, from its recent pace alone: a start that compiles says nothing about the rest."""

from collections import deque

POINTS = 40
FEWEST = 4


class TimeLeft:
    """Told again and again how much is done; says what is left in seconds, or None while nobody can know."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque(maxlen=POINTS)

    def left_s(self, done: int, total: int, now_s: float) -> float | None:
        self._points.append((now_s, done))
        if len(self._points) < FEWEST:
            return None
        # The first point ends the start, and of the others the newer half is the recent pace.
        then_s, then = self._points[max(1, len(self._points) // 2 - 1)]
        return None if done <= then else (now_s - then_s) / (done - then) * max(0, total - done)
