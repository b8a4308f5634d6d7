"""How a task is learnt on a backbone: pieces, heads, patches; knows no data set."""
