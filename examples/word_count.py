"""The most frequent words of text files: counted file by file in calls, added up here as the counts come in.

    python examples/word_count.py README.md CHANGELOG.md

The text travels with the call, for the servers may not have the files."""

import re
import sys
from collections import Counter
from pathlib import Path

import clupy


@clupy.parallel
def count(text):
    return Counter(re.findall(r"[^\W\d_]+", text.lower()))


if __name__ == "__main__":
    paths = sys.argv[1:] or ["README.md"]
    counts = {count(Path(path).read_text("utf-8")): path for path in paths}
    total = Counter()
    for done in clupy.as_completed(counts):
        words = done.result()                   # not .value, which is None for a call that failed
        print(f"{counts[done]}: {words.total()} words")
        total += words
    for word, number in total.most_common(5):
        print(f"{number:6} {word}")
