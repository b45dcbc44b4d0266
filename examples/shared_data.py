"""Share data between calls: a table as CSV and Parquet, one large array for all, and a count of what is done.

    python -m pip install numpy pandas pyarrow
    redis-server &                          # or the address of yours in CLUPY_REDIS
    python examples/shared_data.py
"""
import time

import numpy
import pandas

import clupy


def readings(sensor):
    """Measure, and leave a table for others in Redis, as if it were a folder that every computer has."""
    noise = numpy.random.default_rng(sensor)
    table = pandas.DataFrame({"time": numpy.arange(1000), "value": noise.normal(20 + 10 * sensor, 1, 1000)})
    with clupy.open(f"readings/{sensor}.csv", "w", newline="") as file:
        table.to_csv(file, index=False)
    return len(table)


def summary(sensors):
    """Read all the tables that other calls wrote, and keep them together as Parquet."""
    tables = []
    for sensor in sensors:
        with clupy.open(f"readings/{sensor}.csv") as file:
            tables.append(pandas.read_csv(file).assign(sensor=sensor))
    with clupy.open("readings/all.parquet", "wb") as file:
        pandas.concat(tables).to_parquet(file)


def row_of_product(matrix, row):
    """`matrix` is passed as a Ref and arrives as an array: a computer fetches it once, its workers map it."""
    clupy.counter("rows done").add()
    return float((matrix[row] @ matrix).sum())


if __name__ == "__main__":
    done = [clupy.parallel(readings)(sensor) for sensor in range(4)]
    clupy.wait_all(done)
    print("rows written:", sum(future.result() for future in done))

    clupy.parallel(summary)(range(4)).result()
    with clupy.open("readings/all.parquet", "rb") as file:
        print(pandas.read_parquet(file).groupby("sensor")["value"].mean().round(1).to_dict())

    matrix = numpy.random.default_rng(0).random((2000, 2000))    # 32 MB: shared once, not sent 40 times
    progress = clupy.counter("rows done")
    progress.set(0)
    ref = clupy.share(matrix)
    sums = [clupy.parallel(row_of_product)(ref, row) for row in range(40)]
    while progress.value < len(sums) and not all(future.completed for future in sums):
        print("rows done:", progress.value)
        time.sleep(0.2)
    clupy.wait_all(sums)
    expected = (matrix[:40] @ matrix).sum(axis=1)
    print("rows done:", progress.value)
    print("as expected:", numpy.allclose([future.result() for future in sums], expected))

    clupy.delete(*clupy.keys("readings/*"), "rows done")
