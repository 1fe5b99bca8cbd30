"""Methods x folds x seeds on one data set, with table, files and plot."""
