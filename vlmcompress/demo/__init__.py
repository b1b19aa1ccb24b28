# SPDX-License-Identifier: Apache-2.0
"""The demonstration in a browser (``vlmcompress demo``, extra ``demo``).

Logic without a browser: :mod:`.images`, :mod:`.models`, :mod:`.ask`, :mod:`.picture`, :mod:`.sweep`, :mod:`.leaderboard`;
what is shown of it: :mod:`.html`; the page: :mod:`.app` and one module per tab.
"""
