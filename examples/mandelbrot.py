"""A picture of the Mandelbrot set, a band of it in each call, written as a PNG.

    python examples/mandelbrot.py [FILE [WIDTH]]
"""
import struct
import sys
import zlib

import clupy

LEFT, RIGHT, TOP, BOTTOM = -2.2, 0.8, 1.2, -1.2
DEPTH = 100                             # steps after which a point counts as one of the set


def steps(c):
    """How many steps it takes the point c to leave; DEPTH if it stays."""
    z = 0
    for step in range(DEPTH):
        z = z * z + c
        if abs(z) > 2:
            return step
    return DEPTH


def band(rows, width, height):
    """The pixels of some rows, each a byte: black inside, and brighter the longer a point outside stays."""
    lines = []
    for row in rows:
        y = TOP + (BOTTOM - TOP) * row / height
        found = (steps(complex(LEFT + (RIGHT - LEFT) * column / width, y)) for column in range(width))
        lines.append(bytes(0 if n == DEPTH else min(255, 30 + 9 * n) for n in found))
    return lines


def png(lines, width):
    """The bytes of a greyscale picture."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, len(lines), 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line for line in lines), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "mandelbrot.png"
    width = int(sys.argv[2]) if len(sys.argv) > 2 else 600
    height = width * 4 // 5
    bands = [range(row, min(row + 8, height)) for row in range(0, height, 8)]
    lines = []
    for part in clupy.map(lambda rows: band(rows, width, height), bands, progress=True):
        lines += part
    with open(path, "wb") as file:
        file.write(png(lines, width))
    print(f"{path}: {width} x {height} pixels, {sum(line.count(0) for line in lines)} of them in the set")
