"""Python runs this when the served process starts: no connection leaves the machine, and what was tried is written down.

LDVC_GUARD_RECORD names the file for the record; LDVC_GUARD_FOLDER a folder from which no file should be opened.
"""

import ipaddress
import os
import sys

RECORD = os.environ["LDVC_GUARD_RECORD"]
FOLDER = os.environ["LDVC_GUARD_FOLDER"] + os.sep
PACKAGES = sys.prefix + os.sep  # a virtual environment may lie inside the folder


def note(line: str) -> None:
    with open(RECORD, "a") as record:
        record.write(line + "\n")


def is_here(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def guard(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        if event == "open" and isinstance(arguments[0], str):
            path = os.path.abspath(arguments[0])
            if path.startswith(FOLDER) and not path.startswith(PACKAGES):
                note(f"opened {path}")
        return
    if not is_here(host):
        note(f"{event} {host}")
        raise PermissionError(f"There is no network here, and {host} was asked for.")


sys.addaudithook(guard)
