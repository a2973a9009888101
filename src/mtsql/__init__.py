"""mtsql: a from-scratch trainer for long-horizon multi-turn text-to-SQL agents."""
