"""`python -m fdfs` is `dutchman`. Floor 7."""

from fdfs.cli import main

main()
