"""What a type checker knows of calls: `make lint` has mypy and pyright check this file."""

import asyncio
from collections.abc import Iterator
from typing import Any, assert_type

import clupy


def half(x: int, *, exact: bool = False) -> float:
    return x / 2 if exact else x // 2


async def later(text: str) -> bytes:
    await asyncio.sleep(0)
    return text.encode()


@clupy.parallel
def plain(x: int) -> str:
    return str(x)


@clupy.parallel(max=2, retries=0)
def bounded(x: int) -> list[int]:
    return [x]


class Shop:
    @clupy.parallel
    def price(self, item: str) -> float:
        return float(len(item))


def wrong() -> None:
    clupy.parallel(half)("three")       # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    future = clupy.parallel(half)(3, exact=True)
    assert_type(future, clupy.Future[float])
    assert_type(future.result(), float)
    assert_type(future.value, float | None)
    assert_type(clupy.parallel(later)("a"), clupy.Future[bytes])
    assert_type(plain(1), clupy.Future[str])
    assert_type(bounded(1).result(), list[int])
    assert_type(Shop().price("bread").result(), float)
    assert_type(clupy.wait_all([future, plain(2)], time_out="10s"), bool)
    assert_type(clupy.map(half, [1, 2]), Iterator[float])
    assert_type(next(clupy.as_completed([plain(3)])).result(), str)
    assert_type(clupy.everywhere(half, 4), dict[str, clupy.Future[float]])
    with clupy.Executor(2) as executor:
        assert_type(executor.submit(half, 3), clupy.Future[float])
        assert_type(executor.map(half, [1]), Iterator[float])
    found: dict[str, Any] = {"slots": clupy.slots()}
    print(future.result(), plain(1).result(), bounded(1).result(), found)
