"""Ranks of a run on one host or many: started, watched, started again and regrouped under torch's elastic agent."""
