"""What a training run would cost, on paper: operations, pairs, memory, bytes between devices, seconds, balance."""

from anchor_attn.train.plan.calibration import StepSeconds as StepSeconds
from anchor_attn.train.plan.calibration import calibrate as calibrate
from anchor_attn.train.plan.calibration import measure_steps as measure_steps
from anchor_attn.train.plan.calibration import predict_steps as predict_steps
from anchor_attn.train.plan.devices import DEVICES as DEVICES
from anchor_attn.train.plan.devices import Device as Device
from anchor_attn.train.plan.devices import Rates as Rates
from anchor_attn.train.plan.devices import expect_rates as expect_rates
from anchor_attn.train.plan.devices import find_device as find_device
from anchor_attn.train.plan.devices import recognize_device as recognize_device
from anchor_attn.train.plan.findings import list_findings as list_findings
from anchor_attn.train.plan.models import ModelShape as ModelShape
from anchor_attn.train.plan.models import describe_config as describe_config
from anchor_attn.train.plan.models import describe_model as describe_model
from anchor_attn.train.plan.records import StepPlan as StepPlan
from anchor_attn.train.plan.steps import Cluster as Cluster
from anchor_attn.train.plan.training import DocumentLengths as DocumentLengths
from anchor_attn.train.plan.training import TrainingPlan as TrainingPlan
from anchor_attn.train.plan.training import plan_training as plan_training
from anchor_attn.train.plan.training import read_lengths as read_lengths
from anchor_attn.train.plan.work import Flops as Flops
from anchor_attn.train.plan.work import backward_flops as backward_flops
from anchor_attn.train.plan.work import forward_flops as forward_flops
