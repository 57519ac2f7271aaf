"""Flower's login: the user demo, with the password of FLOWER_PASSWORD or of the file that FLOWER_PASSWORD_FILE names.

Flower's own variable FLOWER_BASIC_AUTH takes a comma for the end of the password, and reads no file.
"""

from hardening.environment import password

_password = password("FLOWER")
if not _password or not _password.isascii():
    raise SystemExit(
        "flowerconfig: FLOWER_PASSWORD is missing, or has a character that is not ASCII: Flower takes none."
    )
basic_auth = [f"demo:{_password}"]
