"""The report: what a probe found, as one page that needs no network and no knowledge of routers."""
