from benchmarks.study.runs import main

if __name__ == "__main__":
    main()
