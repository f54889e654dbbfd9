"""Peak memory of reading in chunks, over the length of the text: `python -m ci.bench_memory`.

Exit status 1 if it depends on the length. The tokenizer's own memory, which does, is shown apart.
"""

from __future__ import annotations

import os
import sys
from functools import partial

from ci import corpus
from ci.demo import VERTICAL_CHUNK_SIZE, embed, load_model, load_tokenizer, tokenize
from ci.measure import measure

LENGTHS = (8_192, 32_768, 131_072)
CHARACTERS_PER_TOKEN = 6  # More than there are, so that the text is long enough.
ALLOWED_SPREAD = 30e6  # Bytes. The tokens themselves, with their mask, are 16 bytes each.


def main() -> int:
    """Measure, print, and return the exit status."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # As in `ci.demo`.
    print(f"Peak memory above the loaded model, in chunks of {VERTICAL_CHUNK_SIZE}")
    print(f"{'tokens':>9}{'seconds':>10}{'reading, MB':>14}{'tokenizer, MB':>16}", flush=True)
    tokenizer = load_tokenizer()
    peaks = []
    for length in LENGTHS:
        text = corpus.text_of_length(CHARACTERS_PER_TOKEN * length)
        [ids] = tokenize([text], tokenizer)
        # Cut to about that many tokens, and the tokens exactly.
        texts, tokens = [text[: len(text) * length // len(ids)]], [ids[:length]]
        tokenizing = measure(load_tokenizer, partial(tokenize, texts))
        reading = measure(
            partial(load_model, texts, tokens),
            partial(embed, texts, f"{length:,} tokens", VERTICAL_CHUNK_SIZE),
        )
        peaks.append(reading.peak_bytes)
        print(
            f"{length:9,}{reading.seconds:10.1f}{reading.peak_bytes / 1e6:14.1f}"
            f"{tokenizing.peak_bytes / 1e6:16.1f}",
            flush=True,
        )
    spread = max(peaks) - min(peaks)
    verdict = "within" if spread <= ALLOWED_SPREAD else "MORE THAN"
    print(f"The peaks are {spread / 1e6:.1f} MB apart: {verdict} {ALLOWED_SPREAD / 1e6:.0f} MB.")
    return 0 if spread <= ALLOWED_SPREAD else 1


if __name__ == "__main__":
    sys.exit(main())
