from trunkline_runtime.cli import main

main()
