from awconv.cli import main

main()
