"""Lightning: the Trainer trains an injected model, and a checkpoint of it loads into a new one."""

import json

import lightning
import timm
import torch
from torch.nn.utils import parameters_to_vector

import se_inject


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("se_inject/resnet18", num_classes=2, zero_init_last=False)

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
task, images = Classifier().eval(), torch.randn(8, 3, 64, 64)
base = timm.create_model("resnet18", num_classes=2).eval()
base.load_state_dict(task.model.state_dict(), strict=False)
assert torch.equal(task.model(images), base(images))
start = blocks(task.model)
assert len(start) == len(se_inject.plan("resnet18").sites)

trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
data = torch.utils.data.TensorDataset(images, torch.arange(8) % 2)
trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=4))
task.eval()
assert not any(map(torch.equal, blocks(task.model), start))

trainer.save_checkpoint("task.ckpt")
again = Classifier.load_from_checkpoint("task.ckpt").eval()
assert torch.equal(again.model(images), task.model(images))
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
