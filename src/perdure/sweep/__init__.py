"""`perdure sweep`: settings of every arm on the same grid, judged on validation rows of the first experiences.

| module | holds |
|---|---|
| `space` | what is searched, and which settings an arm has |
| `trials` | one arm with one point, and the file of what it found |
| `training` | learns a trial and judges it; the only one that imports torch |
| `worker` | a process that trains some trials |
| `cluster` | those processes on a Ray cluster |
| `driver` | plans all trials, runs those that have not ended |
| `table` | what was found, as JSON, in words, as a recipe's tuning block |
| `writing` | the chosen values into the user's recipe |
"""
