output "credentials" {
  description = "The command that writes the kubeconfig."
  value       = "az aks get-credentials --resource-group ${azurerm_resource_group.tally.name} --name ${azurerm_kubernetes_cluster.tally.name}"
}

output "client_id" {
  description = "For the annotation azure.workload.identity/client-id of the ServiceAccount tally."
  value       = azurerm_user_assigned_identity.pods.client_id
}

output "registry" {
  description = "TALLY_REGISTRY, in the overlay's environment.env, beside AZURE_STORAGE_ACCOUNT_NAME."
  value       = "az://${azurerm_storage_container.tally.name}/registry"
}

output "parameters" {
  description = "For the overlay's parameters.yaml."
  value = {
    filesClass   = "azurefile-csi-premium"
    bucketDriver = "blob.csi.azure.com"
    bucketHandle = "${azurerm_resource_group.tally.name}#${azurerm_storage_account.tally.name}#${azurerm_storage_container.tally.name}"
    bucket       = azurerm_storage_container.tally.name
    bucketOption = "-o allow_other"
  }
}
