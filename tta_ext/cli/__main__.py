from tta_ext.cli import main

main()
