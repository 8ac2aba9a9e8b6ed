"""What a kubectl-podferry of one file begins with: it unpacks the program for the Python that runs it, once, and runs it.

Python imports no compiled module out of an archive, so what is needed lies in the user's cache from the first run on; where nothing can be
written there, in a directory that goes when the program ends.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile

ARCHIVE = os.path.abspath(os.path.dirname(__file__))
OLDEST = (3, 11)


def unpacked(archive, parts, into):
    """Unpack what is below `parts` into the new directory `into`, which is there as a whole or not at all."""
    above = os.path.dirname(into)
    os.makedirs(above, mode=0o700, exist_ok=True)
    making = tempfile.mkdtemp(prefix=".new-", dir=above)
    for member in archive.infolist():
        if member.filename.split("/", 1)[0] in parts and not member.is_dir():
            target = os.path.join(making, *member.filename.split("/")[1:])
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
    try:
        os.rename(making, into)
    except OSError:  # another process was faster
        shutil.rmtree(making, ignore_errors=True)
        if not os.path.isdir(into):
            raise


def trusted(directory):
    """Whether nobody else may write there: what lies in it is run."""
    about = os.stat(directory)
    return about.st_uid == os.getuid() and not about.st_mode & 0o022


def place(archive, python):
    """The directory with the program in it."""
    parts = {"common", python}
    with open(ARCHIVE, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:24]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    into = os.path.join(cache, "kubectl-podferry", "%s-%s" % (digest, python))
    try:
        if not os.path.isdir(into):
            unpacked(archive, parts, into)
        if trusted(into) and trusted(os.path.dirname(into)):
            return into
    except OSError:
        pass
    import atexit

    into = os.path.join(tempfile.mkdtemp(prefix="kubectl-podferry-"), "program")
    atexit.register(shutil.rmtree, os.path.dirname(into), ignore_errors=True)
    unpacked(archive, parts, into)
    return into


def main():
    """The program."""
    if sys.version_info < OLDEST:
        sys.exit("kubectl-podferry: this is Python %d.%d, and it needs %d.%d or later" % (sys.version_info[:2] + OLDEST))
    python = "cp%d%d" % sys.version_info[:2]
    with zipfile.ZipFile(ARCHIVE) as archive:
        known = sorted({name.split("/", 1)[0] for name in archive.namelist()} - {"common", "__main__.py"})
        if python not in known:
            sys.exit("kubectl-podferry: this file is for %s, not for this %s; another Python, or `pip install`, will do" % (", ".join(known), python))
        sys.path.insert(0, place(archive, python))
    try:
        from podferry.cli import kubectl
    except ImportError as error:
        sys.exit("kubectl-podferry: this file is not for this system: %s" % error)
    if os.path.basename(sys.argv[0]).startswith("kubectl_complete"):
        kubectl.complete()
    else:
        kubectl.main()


main()
