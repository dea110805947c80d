# SPDX-License-Identifier: Apache-2.0
"""The version of the installed package."""

from importlib import metadata

try:
    __version__ = metadata.version("jaxcp")
except metadata.PackageNotFoundError:  # sources that were never installed
    __version__ = "0+unknown"
