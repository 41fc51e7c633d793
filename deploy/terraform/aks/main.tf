# A cluster for Tally on Azure: what docs/how-to/aks.md does by commands. For OpenTofu and Terraform.
#
#   tofu init && tofu apply -var location=westeurope -var storage_account=...
#   az aks get-credentials --resource-group tally --name tally
#   tofu destroy

terraform {
  required_version = ">= 1.6"
  required_providers {
    azurerm = {
      source  = "hashicorp/azurerm"
      version = "~> 4.9" # whose containers of blobs name their account by its id
    }
  }
}

provider "azurerm" {
  features {}
  subscription_id = var.subscription
}

resource "azurerm_resource_group" "tally" {
  name     = var.name
  location = var.location
}

resource "azurerm_virtual_network" "tally" {
  name                = var.name
  location            = azurerm_resource_group.tally.location
  resource_group_name = azurerm_resource_group.tally.name
  address_space       = ["10.0.0.0/8"]
}

resource "azurerm_subnet" "nodes" {
  name                 = "nodes"
  resource_group_name  = azurerm_resource_group.tally.name
  virtual_network_name = azurerm_virtual_network.tally.name
  address_prefixes     = ["10.240.0.0/16"]
}

resource "azurerm_subnet" "virtual_nodes" {
  name                 = "virtual-nodes"
  resource_group_name  = azurerm_resource_group.tally.name
  virtual_network_name = azurerm_virtual_network.tally.name
  address_prefixes     = ["10.241.0.0/16"]

  delegation {
    name = "containers"
    service_delegation {
      name    = "Microsoft.ContainerInstance/containerGroups"
      actions = ["Microsoft.Network/virtualNetworks/subnets/action"]
    }
  }
}

resource "azurerm_kubernetes_cluster" "tally" {
  name                      = var.name
  location                  = azurerm_resource_group.tally.location
  resource_group_name       = azurerm_resource_group.tally.name
  dns_prefix                = var.name
  kubernetes_version        = var.kubernetes_version
  oidc_issuer_enabled       = true
  workload_identity_enabled = true

  default_node_pool {
    name                 = "nodes"
    vm_size              = var.machine
    vnet_subnet_id       = azurerm_subnet.nodes.id
    auto_scaling_enabled = true
    min_count            = 1
    max_count            = var.most_nodes
  }

  # An identity of the cluster's own: no service principal is left behind.
  identity {
    type = "SystemAssigned"
  }

  network_profile {
    network_plugin = "azure"
    network_policy = "azure"
    service_cidr   = "10.2.0.0/16"
    dns_service_ip = "10.2.0.10"
  }

  aci_connector_linux {
    subnet_name = azurerm_subnet.virtual_nodes.name
  }

  storage_profile {
    blob_driver_enabled = true
  }

  workload_autoscaler_profile {
    keda_enabled = true
  }
}

# Workers with GPUs, from none. Left out where the quota has none: 'tally cluster doctor --location' says so.
resource "azurerm_kubernetes_cluster_node_pool" "gpu" {
  count                 = var.most_gpu_nodes > 0 ? 1 : 0
  name                  = "gpu"
  kubernetes_cluster_id = azurerm_kubernetes_cluster.tally.id
  vm_size               = var.gpu_machine
  vnet_subnet_id        = azurerm_subnet.nodes.id
  node_taints           = ["sku=gpu:NoSchedule"]
  auto_scaling_enabled  = true
  min_count             = 0
  max_count             = var.most_gpu_nodes
}

# The virtual nodes' connector joins containers to its subnet.
resource "azurerm_role_assignment" "virtual_nodes" {
  scope                = azurerm_subnet.virtual_nodes.id
  role_definition_name = "Network Contributor"
  principal_id         = azurerm_kubernetes_cluster.tally.aci_connector_linux[0].connector_identity[0].object_id
}

resource "azurerm_storage_account" "tally" {
  name                            = var.storage_account
  location                        = azurerm_resource_group.tally.location
  resource_group_name             = azurerm_resource_group.tally.name
  account_tier                    = "Standard"
  account_replication_type        = "LRS"
  allow_nested_items_to_be_public = false
}

resource "azurerm_storage_container" "tally" {
  name               = "tally"
  storage_account_id = azurerm_storage_account.tally.id
}

# The driver that mounts the container as a folder reads the account's keys as the nodes.
resource "azurerm_role_assignment" "nodes" {
  scope                = azurerm_storage_account.tally.id
  role_definition_name = "Storage Account Key Operator Service Role"
  principal_id         = azurerm_kubernetes_cluster.tally.kubelet_identity[0].object_id
}

# Whom the pods act as, instead of a key of the account.
resource "azurerm_user_assigned_identity" "pods" {
  name                = "${var.name}-pods"
  location            = azurerm_resource_group.tally.location
  resource_group_name = azurerm_resource_group.tally.name
}

resource "azurerm_federated_identity_credential" "pods" {
  name                = "tally"
  resource_group_name = azurerm_resource_group.tally.name
  parent_id           = azurerm_user_assigned_identity.pods.id
  audience            = ["api://AzureADTokenExchange"]
  issuer              = azurerm_kubernetes_cluster.tally.oidc_issuer_url
  subject             = "system:serviceaccount:${var.namespace}:tally"
}

resource "azurerm_role_assignment" "pods" {
  scope                = azurerm_storage_account.tally.id
  role_definition_name = "Storage Blob Data Contributor"
  principal_id         = azurerm_user_assigned_identity.pods.principal_id
}
