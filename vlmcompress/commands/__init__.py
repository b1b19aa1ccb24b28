# SPDX-License-Identifier: Apache-2.0
"""What the sub-commands of the command line do; imported only when one is called."""
