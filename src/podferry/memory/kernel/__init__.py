"""The kernel's interfaces to other processes' memory: userfaultfd, pagemap, maps."""
