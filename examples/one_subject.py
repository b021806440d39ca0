"""Fine-tune the miniature on one subject, without Ray or MLflow.

20 steps take seconds and show that it works; 400, the miniature's default, bind the subject.
"""

from pathlib import Path

import dreambooth as db

subject = {"name": "car", "class_noun": "car", "identifier": "tfz", "instance_images": str(db.subject_dir("coral-car"))}
config = db.load_config({"subject": subject, "base_model": "miniature", "train": {"max_train_steps": 20}})
base, sampler = db.resolve_base_model("miniature").directory, {"num_inference_steps": 12, "guidance_scale": 4.0}

class_images = db.sample(db.load_pipeline(base), ["a photo of a car"] * 8, range(8), **sampler)
data = db.prepare_data(base, config, db.find_instance_images([subject["instance_images"]]), class_images)
engine = db.TorchEngine(db.load_model(base, config), config.train)
db.fit(engine, data, config.train, on_step=lambda step, metrics: print(step, metrics.loss))

db.export_pipeline(base, engine.state_dict(), target := Path("coral-car"))
db.sample(db.load_pipeline(target), ["a photo of tfz car in the snow"], [0], **sampler)[0].save("coral-car.png")
