"""Rights of the process that runs a case, where the tests run as root, whom no permission stops."""

import ctypes
import os
import struct
from typing import Literal

Rights = Literal["all", "owner", "reader"]
"""owner: permissions count, as for any user; reader: another user, who may read everything and write only what all may.

The second is for places where root would damage the machine.
"""
_VERSION_3, _KEEP_CAPABILITIES, _ADOPT, _READ_ALL, _NOBODY = 0x20080522, 8, 36, 1 << 2, 65534


def limit(rights: Rights) -> None:
    """Give up rights, for good."""
    if rights == "all" or os.geteuid() != 0:
        return
    if rights == "owner":
        _keep(0)
        return
    ctypes.CDLL(None).prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    _keep(_READ_ALL)


def adopt_orphans() -> None:
    """Become the parent of processes whose parents end, so that this process can find and end them."""
    ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0)


def _keep(capabilities: int) -> None:
    header = struct.pack("II", _VERSION_3, 0)
    data = struct.pack("IIIIII", capabilities, capabilities, 0, 0, 0, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, data):
        raise OSError(ctypes.get_errno(), "cannot give up the rights of root")
