"""The methods that adapt a backbone to a task: one file for each, and the parts that they share."""
