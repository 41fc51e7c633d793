variable "subscription" {
  description = "The subscription; null: that of the environment (ARM_SUBSCRIPTION_ID)."
  type        = string
  default     = null
}

variable "name" {
  description = "Of the resource group, the network and the cluster."
  type        = string
  default     = "tally"
}

variable "location" {
  description = "For example westeurope."
  type        = string
}

variable "storage_account" {
  description = "Its name: 3 to 24 small letters and digits, like no other in the world."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9]{3,24}$", var.storage_account))
    error_message = "A storage account's name has 3 to 24 small letters and digits."
  }
}

variable "kubernetes_version" {
  description = "1.30 or later; null: Azure's present one."
  type        = string
  default     = null
}

variable "namespace" {
  description = "That of Tally on the cluster."
  type        = string
  default     = "tally"
}

variable "machine" {
  description = "Of the pool that is always there."
  type        = string
  default     = "Standard_D4s_v5"
}

variable "most_nodes" {
  description = "At most so many of them."
  type        = number
  default     = 4
}

variable "gpu_machine" {
  description = "Of the pool with GPUs, which begins with none."
  type        = string
  default     = "Standard_NC4as_T4_v3"
}

variable "most_gpu_nodes" {
  description = "At most so many of them; 0: no such pool."
  type        = number
  default     = 4
}
