"""How many pods an agent wants: staffing, prices, schedules, and the loads they are decided on."""
