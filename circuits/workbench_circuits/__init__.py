"""Discovery, evaluation and comparison of circuits: tasks, published circuits, overlap."""
