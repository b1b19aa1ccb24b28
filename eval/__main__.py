# SPDX-License-Identifier: Apache-2.0
"""``python -m vlmcompress.eval MODEL …`` is ``vlmcompress eval MODEL …``, for ``accelerate launch -m vlmcompress.eval``."""

import sys

from ..cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
