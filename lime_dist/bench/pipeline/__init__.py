"""`lime-dist bench pipeline`: what LIMe costs over LLaMA when stages lie on hosts with slow links, against other pipelines."""
