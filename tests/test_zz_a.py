import time
def test_a(tiny_run, tiny_config, tmp_path):
    from semantic_routing.train import start
    for arm in ("depth","joint","fusedit"):
        t=time.process_time(); start(tiny_config(arm), tmp_path/arm); print(arm, time.process_time()-t)
    import json
    print((tiny_run/"metrics.jsonl").read_text()); print(sorted(p.name for p in tiny_run.rglob("*")))
