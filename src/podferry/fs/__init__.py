"""Files and directories that others may have had their hands on: names beneath a directory, and directories of our own."""
