from benchmarks.study.coco.runs import main

if __name__ == "__main__":
    main()
