# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxcp`: the command line."""

from jaxcp.cli.main import main

if __name__ == "__main__":
    main()
