"""`python3 -m podferry.snapshotter` is podferry-snapshotter."""

from podferry.snapshotter import main

main()
